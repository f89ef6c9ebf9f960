"""The plan of a stage says what training will do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_support import tiny_batch, tiny_policy

from qwen_vla_core.data.mixture_recipe import DatasetSpec, FamilySpec, MixtureRecipe
from qwen_vla_core.data.sampling import Quota
from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.training.dry_run import describe, family_samples, time_step
from qwen_vla_core.training.flops import FlopModel, work_of
from qwen_vla_core.training.memory import estimate_memory
from qwen_vla_core.training.peak import Peak


@pytest.fixture
def mixture() -> MixtureRecipe:
    """Three families, one of which does not fill a sample of every batch."""
    shares = (("manipulation", 70.0), ("navigation", 25.0), ("captions", 5.0))
    families = tuple(FamilySpec(name, (DatasetSpec("x"),), weight) for name, weight in shares)
    return MixtureRecipe(batch_size=10, families=families)


def test_samples_per_family_are_those_that_training_draws(mixture: MixtureRecipe) -> None:
    plans = list(family_samples(mixture, 7))
    quota = Quota(mixture.weights, 10)
    drawn = np.array([quota.counts(step) for step in range(7)])
    assert [plan.total for plan in plans] == drawn.sum(0).tolist() and sum(plan.total for plan in plans) == 70
    assert [plan.per_step for plan in plans] == list(zip(drawn.min(0).tolist(), drawn.max(0).tolist(), strict=True))
    assert plans[2].per_step == (0, 1) and plans[0].share == pytest.approx(0.7)


def test_a_plan_with_a_frozen_part(aloha: Embodiment, mixture: MixtureRecipe) -> None:
    policy = tiny_policy(aloha, model_type="qwen3_vl")
    policy.backbone.visual.requires_grad_(False)
    work = work_of(tiny_batch(policy, aloha), 4)
    durations = iter([9.0, 0.5, 0.25, 1.0])  # the first one warms up
    plan = describe(
        policy,
        stage="cpt",
        rates={"vision": 0.0, "language": 1e-5, "decoder": 1e-4},
        steps=1000,
        mixture=mixture,
        works=[work, work],
        timed=lambda: next(durations),
        peak=Peak(1e12, "data sheet", "x"),
    )
    assert not list(durations)
    groups = {group.name: group for group in plan.groups}
    assert groups["vision"].trained == 0 < groups["vision"].parameters
    assert groups["decoder"].trained == groups["decoder"].parameters
    assert groups["decoder"].parameters == sum(p.numel() for p in policy.decoder.parameters())
    assert sum(group.parameters for group in plan.groups) == sum(p.numel() for p in policy.parameters())
    assert plan.timing is not None and plan.timing.seconds_per_step == 0.5 and plan.eta_s == 500.0
    assert plan.flops_per_step == 2 * FlopModel.of(policy).total(work) and plan.tokens_per_step == 2 * work.tokens
    assert plan.mfu == pytest.approx(plan.flops_per_step / 0.5 / 1e12)
    assert plan.memory == estimate_memory(policy, [work])

    lines = str(plan).splitlines()
    assert lines[0] == "cpt: 1,000 steps of 10 samples"
    (vision,) = [line for line in lines if line.startswith("vision")]
    assert vision.split()[1:] == [f"{groups['vision'].parameters:,}", "0", "frozen"]
    (decoder,) = [line for line in lines if line.startswith("decoder")]
    assert decoder.endswith("0.0001")
    (navigation,) = [line for line in lines if line.startswith("navigation")]
    assert navigation.split()[1:] == ["25.0%", "2-3", "2,500"]
    assert "time: 8 min at 0.5 s a step" in str(plan) and "memory of one rank, estimated: " in str(plan)

    report = json.loads(json.dumps(plan.to_json()))
    assert report["memory"]["peak"] == plan.memory.peak and report["eta_s"] == 500.0
    assert report["groups"][0]["name"] == "vision" and report["families"][1]["total"] == 2500


def test_without_a_batch_nothing_is_made_up(aloha: Embodiment, mixture: MixtureRecipe) -> None:
    policy = tiny_policy(aloha, model_type="qwen3_vl")
    plan = describe(policy, stage="sft", rates={"decoder": 1e-4}, steps=10, mixture=mixture)
    assert plan.flops_per_step is None and plan.timing is None and plan.eta_s is None and plan.mfu is None
    assert plan.memory.activations == 0 and str(plan).endswith("time: not measured")
    assert [group.trained > 0 for group in plan.groups] == [False, False, True]


def test_a_step_is_timed_and_done() -> None:
    done: list[int] = []
    assert time_step(lambda: done.append(1)) >= 0.0 and done == [1]
