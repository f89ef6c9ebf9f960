"""Two real ranks (torchrun, gloo) against one: equal losses, norms and weights, and states that move between them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_support import SAVED_AT, SCENARIOS, STEPS, Scenario, build, train
from safetensors.torch import load_file

from qwen_vla_core.errors import UserError
from qwen_vla_core.training import distributed, parallel
from qwen_vla_core.training.distributed import Ranks, clip_gradients
from qwen_vla_core.training.lora import apply_lora

torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(600)  # two processes in step: slow where other work has the cores

LOSSES = ("action", "navigation", "text", "norm")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(work: Path) -> dict[str, dict[str, Any]]:
    """One rank without torchrun: as it should be."""
    return {
        "alone": train(Scenario(save=True), Ranks(), work / "alone", work),
        "alone_frozen": train(Scenario(frozen=True, steps=2), Ranks(), work / "alone_frozen", work),
        "alone_half": train(Scenario(precision="bf16", steps=2), Ranks(), work / "alone_half", work),
    }


@pytest.fixture(scope="module")
def pair(work: Path, alone: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of all scenarios on two ranks, per rank."""
    script = Path(__file__).with_name("ranks_support.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(script), str(work)], capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "view tensor" not in done.stderr and "deprecated" not in done.stderr, done.stderr
    return [json.loads((work / f"results_{rank}.json").read_text()) for rank in range(2)]


def weights(work: Path, name: str) -> dict[str, torch.Tensor]:
    return {
        f"{kind}.{key}": value
        for kind in ("trained", "averaged")
        for key, value in load_file(work / name / f"{kind}.safetensors").items()
    }


def assert_same(work: Path, name: str, result: dict[str, Any], other: str, expected: dict[str, Any]) -> None:
    """Equal but for the order of float32 sums. The learning rate is 1e-3: a real difference would be a hundredfold."""
    rows = {row["step"]: row for row in [*expected["rows"], expected["again"]]}
    found = [*result["rows"], result["again"]]
    assert [row["step"] for row in found] == [step for step in rows if step >= found[0]["step"]]
    for row in found:
        for key in LOSSES:
            assert row[key] == pytest.approx(rows[row["step"]][key], rel=1e-4, abs=1e-5), (name, row["step"], key)
    mine, theirs = weights(work, name), weights(work, other)
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert torch.allclose(mine[key], theirs[key], rtol=1e-4, atol=1e-5), (name, key)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "ddp_thrifty", "fsdp2_thrifty"])
def test_two_ranks_learn_what_one_learns(
    name: str, work: Path, alone: dict[str, Any], pair: list[dict[str, Any]]
) -> None:
    """Also with two micro-batches and recomputed activations; each rank lacks pictures or actions in some batch."""
    assert len(pair[0][name]["rows"]) == STEPS
    assert_same(work, name, pair[0][name], "alone", alone["alone"])
    assert pair[0][name] == pair[1][name]  # every rank logs and clips alike


@pytest.mark.parametrize("name", ["ddp_frozen", "fsdp2_frozen"])
def test_frozen_groups_stay(name: str, work: Path, alone: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    assert_same(work, name, pair[0][name], "alone_frozen", alone["alone_frozen"])
    fresh = dict(build().named_parameters())
    for key, value in load_file(work / name / "trained.safetensors").items():
        assert torch.equal(value, fresh[key]) == key.startswith("backbone."), key


def test_half_precision_on_two_ranks(alone: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    """bfloat16 rounds differently in batches of other shapes; losses stay close."""
    for row, expected in zip(pair[0]["fsdp2_half"]["rows"], alone["alone_half"]["rows"], strict=True):
        for key in ("action", "navigation", "text"):
            assert row[key] == pytest.approx(expected[key], rel=0.05, abs=0.02)
    assert pair[0]["fsdp2_half"]["rows"][0] != pair[0]["fsdp2"]["rows"][0]


@pytest.mark.parametrize("name", ["ddp_resumed", "fsdp2_resumed"])
def test_two_ranks_go_on_from_one(name: str, work: Path, alone: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in pair[0][name]["rows"]] == list(range(SAVED_AT, STEPS))
    assert_same(work, name, pair[0][name], "alone", alone["alone"])


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_one_rank_goes_on_from_two(name: str, work: Path, alone: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    written = {path.name.split(".")[0] for path in (work / name / "state").glob("step_*/*.safetensors")}
    assert written == {"rank_00000", "rank_00001"}  # both wrote a share
    result = train(Scenario(resume=name), Ranks(), work / f"{name}_alone", work)
    assert [row["step"] for row in result["rows"]] == list(range(SAVED_AT, STEPS))
    assert_same(work, f"{name}_alone", result, "alone", alone["alone"])


def test_a_fault_of_one_rank_is_known_to_all(work: Path, pair: list[dict[str, Any]]) -> None:
    for results in pair:
        assert results["unequal"]["error"] == "no space"
        assert "the same keys on every rank" in results["unequal"]["keys"]
        assert "No space left on device; the last good state is " in results["full_disk"]["error"]
        assert "step_00000001: fix that" in results["full_disk"]["error"]
    assert [path.name for path in (work / "full_disk" / "state").iterdir()] == ["step_00000001"]
    assert [results["ranks"]["rank"] for results in pair] == ["0", "1"]


def test_every_scenario_is_looked_at() -> None:
    looked_at = {"ddp", "fsdp2", "ddp_resumed", "fsdp2_resumed", "ddp_frozen", "fsdp2_frozen", "fsdp2_half"}
    assert set(SCENARIOS) == looked_at | {"ddp_thrifty", "fsdp2_thrifty"}


def test_clipping_equals_torch() -> None:
    def gradients() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), ())]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return [*parameters, torch.nn.Parameter(torch.zeros(2))]  # the last has no gradient

    for limit in (0.1, 100.0):
        mine, theirs = gradients(), gradients()
        norm = clip_gradients(mine, limit)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, limit)), rel=1e-6)
        for one, other in zip(mine[:3], theirs[:3], strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8)
    assert clip_gradients([torch.nn.Parameter(torch.zeros(2))], 1.0) == 0.0
    broken = gradients()
    assert broken[0].grad is not None
    broken[0].grad[0, 0] = torch.nan
    assert not torch.isfinite(torch.tensor(clip_gradients(broken, 1.0)))


def test_errors_name_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build()
    with pytest.raises(UserError, match=r"^scale.parallel 'tp': use ddp or fsdp2$"):
        parallel.parallelise(policy, "tp", Ranks())  # type: ignore[arg-type]
    apply_lora(policy, rank=2)
    with pytest.raises(UserError, match=r"^scale.parallel: adapters \(lora\) cannot be sharded; use ddp"):
        parallel.parallelise(policy, "fsdp2", Ranks())
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^environment has RANK but not WORLD_SIZE: start with torchrun"):
        distributed.start("cpu")


def test_compiling_needs_a_compiler_and_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a cached kernel needs no compiler
    policy = build().eval()
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match=r"^scale.compile: torch.compile does not work on cpu here .*scale.compile"),
    ):
        parallel.compile_blocks(policy)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block = policy.decoder.blocks[0]
    condition = torch.randn(2, 1, policy.config.decoder.width)
    layer: Any = policy.backbone.model.model.language_model.layers[0]
    x = torch.randn(2, 5, layer.hidden_size)
    angles = torch.zeros(2, 5, policy.backbone.config.get_text_config().head_dim)

    def read() -> torch.Tensor:
        return torch.as_tensor(layer(x, position_embeddings=(angles.cos(), angles), attention_mask=None))

    with torch.no_grad():
        expected, answer = block.times(condition), read()
        parallel.compile_blocks(policy)
        for mine, theirs in zip(block.times(condition), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(read(), answer)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3 and not torch._dynamo.utils.counters["graph_break"]
    )
