"""Stage IV: PPO on success in simulation. Collect whole episodes, estimate advantages, update, log, save, repeat.

An iteration is a function of the weights it begins with, the seed and its number: a killed run repeats the iteration
that it was in and ends with the weights it would have had.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from qwen_vla_core.model.device import choose_device
from qwen_vla_core.training.actor_critic import ActorCritic
from qwen_vla_core.training.flow_sde import SdeConfig
from qwen_vla_core.training.ppo import Decisions, explained_variance, gae, normalise, optimise
from qwen_vla_core.training.rl_recipe import RlRecipe
from qwen_vla_core.training.rl_setup import build_optimizer, groups, places
from qwen_vla_core.training.rollouts import Decision, Episode, Seat, collect, judge_again, scene_seeds
from qwen_vla_core.training.run_log import EVALUATIONS, LOG, read_rows
from qwen_vla_core.training.state import Average, restore_state, save_state
from qwen_vla_core.training.tensorboard import FOLDER, TensorBoardLog
from qwen_vla_core.training.world_host import WorldFactory
from qwen_vla_core.training.world_pool import WorldPool, open_pool

_UPDATE, _EVALUATION, _NOISE = 5, 6, 7  # what a random stream is for; scenes have 4


def train_rl(
    recipe: RlRecipe,
    out: Path,
    checkpoint: Path,
    progress: bool = True,
    device: str = "auto",
    worlds: Mapping[str, WorldFactory] | None = None,
) -> dict[str, Any]:
    """Runs or resumes a recipe and writes the checkpoint.

    Args:
        recipe: what to start from, where to act, how to update.
        out: folder of the run: state, ``log.jsonl``, ``evaluations.jsonl``.
        checkpoint: where the best weights go (the last ones where nothing is evaluated).
        progress: whether to draw progress bars.
        device: of the policy: auto, cpu or cuda.
        worlds: robot → how to build its world, importable by name; default: what its embodiment names.

    Returns:
        Iterations, seconds, success of the last iteration, and all evaluations: iterations done → robot → rate.

    Raises:
        UserError: an impossible recipe, a damaged or foreign state, worlds that died, or a loss that is not finite (the
            last good state and checkpoint stay).
    """
    torch.set_num_threads(recipe.threads)
    start = recipe.start_folder()
    policy = load_checkpoint(start, choose_device(device)[0])
    seats, factories = places(recipe, policy, worlds or {})
    model = ActorCritic(policy).eval()
    optimizer = build_optimizer(recipe, model)
    sde = SdeConfig(
        policy.config.flow.steps if recipe.sampling.steps is None else recipe.sampling.steps,
        recipe.sampling.noise_level,
        recipe.sampling.reduction,
    )
    out.mkdir(parents=True, exist_ok=True)
    origin = str(read_config(start)["weights_id"])
    identity = {"stage": "rl", "recipe": recipe.identity, "start": origin}
    first = min(_restore(out, model, optimizer, identity), recipe.iterations)
    with contextlib.ExitStack() as open_things:
        board = open_things.enter_context(TensorBoardLog(out / FOLDER, first)) if recipe.tensorboard else None
        pool = open_things.enter_context(open_pool(factories, recipe.workers, recipe.workers_backend))
        run = _Run(recipe, identity, out, checkpoint, model, optimizer, pool, seats, sde, board, progress)
        return run.run(first)


class _Run:
    """One run's state between iterations."""

    def __init__(
        self,
        recipe: RlRecipe,
        identity: Mapping[str, Any],
        out: Path,
        checkpoint: Path,
        model: ActorCritic,
        optimizer: torch.optim.AdamW,
        pool: WorldPool,
        seats: list[Seat],
        sde: SdeConfig,
        board: TensorBoardLog | None,
        progress: bool,
    ) -> None:
        self.recipe, self.identity, self.out, self.checkpoint = recipe, identity, out, checkpoint
        self.model, self.optimizer, self.pool = model, optimizer, pool
        self.seats, self.sde, self.board, self.progress = seats, sde, board, progress
        self.result: dict[str, Any] = {}

    def run(self, first: int) -> dict[str, Any]:
        """All iterations from number ``first`` on."""
        recipe, began = self.recipe, time.monotonic()
        if first == 0 and recipe.evaluate is not None:
            self._evaluate(0)
        bar = tqdm(range(first, recipe.iterations), "rl", recipe.iterations, initial=first, disable=not self.progress)
        for iteration in bar:
            row = self._iterate(iteration)
            done = iteration + 1
            last = done == recipe.iterations
            bar.set_postfix_str(f"success {row['success']:.2f}, kl {row['kl']:.4f}")
            _append(self.out / LOG, row)
            if self.board is not None:
                self.board.row(row)
            self.result = {"success": row["success"]}
            if recipe.evaluate is not None and (done % recipe.evaluate.every == 0 or last):
                self._evaluate(done)
            if done % recipe.save_every == 0 or last:
                if recipe.evaluate is None:
                    self._export(done)
                _save(self.out, done, self.model, self.optimizer, self.identity)
        seconds = round(time.monotonic() - began, 1)
        return {"iterations": recipe.iterations, "seconds": seconds, **self.result, "evaluations": self._evaluated()}

    def _iterate(self, iteration: int) -> dict[str, Any]:
        recipe, began = self.recipe, time.monotonic()
        scenes = scene_seeds(recipe.seed, iteration, len(self.seats) * recipe.rounds)
        episodes = self._collect(scenes, (recipe.seed, _NOISE, iteration), self.sde, f"iteration {iteration}")
        collected_s = time.monotonic() - began
        decisions, advantages, returns = _targets(episodes, recipe)
        rates = {
            name: rate * recipe.scale(iteration) * (name == "value" or iteration >= recipe.ppo.value_first)
            for name, _, rate in groups(recipe, self.model)
        }
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        batch = Decisions(
            torch.tensor([d.log_prob for d in decisions]),
            torch.tensor([d.value for d in decisions]),
            normalise(advantages, [d.robot for d in decisions]),
            returns,
        )
        rng = np.random.default_rng([recipe.seed, _UPDATE, iteration])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        try:
            found = optimise(
                lambda indices: self._judge([decisions[i] for i in indices.tolist()]),
                batch,
                self.optimizer,
                recipe.ppo,
                generator,
                lambda indices: _parts(indices, decisions, recipe.micro_batch),
            )
        except FloatingPointError as error:
            raise UserError(
                f"rl iteration {iteration}: {error}; the last good state is in {self.out}: "
                "lower rates.decoder, or sampling.noise_level, and begin again in another --out"
            ) from None
        seconds = time.monotonic() - began
        return {
            "stage": "rl",
            "step": iteration + 1,
            **found,
            "explained_variance": explained_variance(batch.value, returns),
            **_shares(episodes),
            "episodes": len(episodes),
            "decisions": len(decisions),
            **{f"lr_{name}": rate for name, rate in rates.items()},
            "samples_per_s": round(len(decisions) / seconds, 2),
            "collect_s": round(collected_s, 2),
            "seconds": round(seconds, 2),
        }

    def _judge(self, decisions: list[Decision]) -> tuple[torch.Tensor, torch.Tensor]:
        with self._autocast():
            return judge_again(self.model, decisions, self.sde)

    def _collect(self, scenes: Sequence[int], noise_seed: tuple[int, ...], sde: SdeConfig, what: str) -> list[Episode]:
        bar = tqdm(total=len(scenes), desc=what, unit="episode", leave=False, disable=not self.progress)
        with bar, self._autocast():
            return collect(
                self.model,
                self.pool,
                self.seats,
                scenes,
                noise_seed,
                sde,
                keep_readings=not (self.recipe.rates.vision or self.recipe.rates.language),
                forward_batch=self.recipe.forward_batch,
                on_episode=lambda _: bar.update() and None,
            )

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.model.policy.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            yield

    def _evaluate(self, done: int) -> None:
        """Success without exploration noise, per robot; keeps the weights if they are the best so far."""
        spec = self.recipe.evaluate
        assert spec is not None
        robots = list(dict.fromkeys(seat.robot for seat in self.seats))
        # Slots play every n-th scene, n = number of slots: as many scenes as give each robot at least its episodes.
        rounds = max(-(-spec.episodes // sum(seat.robot == robot for seat in self.seats)) for robot in robots)
        scenes = scene_seeds(spec.seed, _EVALUATION * 1_000_000, len(self.seats) * rounds)
        still = SdeConfig(self.sde.steps, 0.0, self.sde.reduction)
        episodes = self._collect(scenes, (spec.seed, _EVALUATION), still, "evaluation")
        for robot in robots:
            own = [episode for episode in episodes if episode.seat.robot == robot][: spec.episodes]
            rate = Rate(sum(episode.success for episode in own), len(own))
            row = {"stage": "rl", "step": done, "embodiment": robot, "task": None, "success": rate.to_dict()}
            _append(self.out / EVALUATIONS, row)
            if self.board is not None:
                self.board.evaluation(row)
        if self._is_best(done):
            self._export(done)

    def _evaluated(self) -> dict[int, dict[str, Any]]:
        """Iterations done → robot → rate, of all evaluations there have been."""
        path = self.out / EVALUATIONS
        found: dict[int, dict[str, Any]] = {}
        for row in read_rows(path, lambda row: (row["step"], row.get("embodiment"))) if path.exists() else ():
            found.setdefault(row["step"], {})[row["embodiment"]] = row["success"]
        return found

    def _is_best(self, done: int) -> bool:
        """Whether no earlier weights were as good: the mean over robots counts, of equals the first."""
        mean = {
            step: sum(rate["rate"] for rate in rates.values()) / len(rates)
            for step, rates in self._evaluated().items()
            if step <= done
        }
        return max(mean, key=lambda step: (mean[step], -step)) == done

    def _export(self, done: int) -> None:
        result = {"iterations": done, **self.result, "evaluated": self._evaluated().get(done)}
        provenance = {"stage": "rl", "recipe": self.recipe.to_json(), "start": self.identity["start"], "result": result}
        provenance["torch"] = torch.__version__
        save_checkpoint(self.model.policy, self.checkpoint, getattr(torch, self.recipe.export), provenance)


def _targets(episodes: Sequence[Episode], recipe: RlRecipe) -> tuple[list[Decision], torch.Tensor, torch.Tensor]:
    """All decisions with their advantages and returns."""
    goes_on = recipe.ppo.timeouts == "bootstrap"
    estimates = [
        gae(e.rewards, e.values, e.last_value if goes_on else 0.0, recipe.ppo.gamma, recipe.ppo.gae_lambda)
        for e in episodes
    ]
    decisions = [decision for episode in episodes for decision in episode.decisions]
    return decisions, torch.cat([a for a, _ in estimates]), torch.cat([r for _, r in estimates])


def _parts(indices: torch.Tensor, decisions: Sequence[Decision], most: int) -> list[torch.Tensor]:
    """Parts of a minibatch that one forward pass can judge: one robot, at most ``most`` decisions."""
    by_robot: dict[tuple[str, int], list[int]] = {}
    for index in indices.tolist():
        by_robot.setdefault((decisions[index].robot, decisions[index].executed), []).append(index)
    return [part for own in by_robot.values() for part in torch.tensor(own).split(most)]


def _shares(episodes: Sequence[Episode]) -> dict[str, float]:
    """Success over all and per robot, time-outs, decisions per episode."""
    row = {"success": sum(e.success for e in episodes) / len(episodes)}
    robots = list(dict.fromkeys(episode.seat.robot for episode in episodes))
    for robot in robots if len(robots) > 1 else ():
        own = [episode for episode in episodes if episode.seat.robot == robot]
        row[f"{robot}_success"] = sum(e.success for e in own) / len(own)
    row["timeout_share"] = sum(e.timed_out for e in episodes) / len(episodes)
    return row


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _save(out: Path, done: int, model: ActorCritic, optimizer: torch.optim.AdamW, identity: Mapping[str, Any]) -> None:
    """Writes what a resumed run needs. The only place, with ``_restore``, that knows how a state is stored."""
    save_state(out, done, model, optimizer, Average(model, 0.0), identity)


def _restore(out: Path, model: ActorCritic, optimizer: torch.optim.AdamW, identity: Mapping[str, Any]) -> int:
    """Brings model and optimizer to the newest saved state; returns its finished iterations, 0 where there is none.

    Raises:
        UserError: it is damaged, of another model, or of another run.
    """
    return restore_state(out, model, optimizer, Average(model, 0.0), identity)
