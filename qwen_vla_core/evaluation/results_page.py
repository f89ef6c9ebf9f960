"""docs/results.md from stored result files and ``published.yaml``: what is ours, what is theirs, what may be compared.

The page is a pure function of those files: the same files give the same text, to the letter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.episodes import execute_steps_of
from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.evaluation.report import axis_table
from qwen_vla_core.evaluation.results import Result, is_result, read_result
from qwen_vla_core.evaluation.suites import SUITES, make_suite
from qwen_vla_core.evaluation.suites.protocol import IN_DISTRIBUTION

PUBLISHED = Path(__file__).with_name("published.yaml")
ALL_OOD = "all OOD axes"
OF_SUITES = "suites"  # folder below a checkpoint's results, for results of suites
# The robot's own world, as older result files name it → the suite that asks the same question in distribution.
WORLD_SUITES = {
    ("aloha", "pick"): "aloha",
    ("aloha", "transfer"): "aloha",
    ("widowx", "place"): "widowx",
    ("mobile_base", "all"): "navigation",
    ("widowx", "belt"): "belt",
}
# Settings with which a stored result is the plain one: the world waits, the prompt is the robot's own.
PLAIN: Mapping[str, Any] = {"told": None, "latency_ms": None, "expert": False, "flow_steps": None}


@dataclass(frozen=True)
class Stored:
    """A result file of ours.

    Attributes:
        name: below the checkpoints' folder, for the page.
        checkpoint: whose results they are: ``generalist`` for ``generalist.results`` and its ``suites``,
            ``generalist (told)`` for another folder below it, which holds another training.
        result: what is in it.
    """

    name: str
    checkpoint: str
    result: Result

    @property
    def suite(self) -> str:
        """Suite, also for older files that only name a world."""
        if self.result.suite != "world":
            return self.result.suite
        settings = self.result.header["settings"]
        return WORLD_SUITES.get((str(settings.get("embodiment")), str(settings.get("task"))), "world")

    @property
    def unusual(self) -> tuple[str, ...]:
        """Settings that make it another question than the plain one."""
        settings = self.result.header["settings"]
        plain = dict(PLAIN)
        if "execute_steps" in settings:  # the plain question is asked as often as the robot's YAML says
            robot = settings.get("embodiment") or make_suite(self.result.suite).embodiment
            plain["execute_steps"] = execute_steps_of(str(robot))
        found = [f"{key} {settings[key]}" for key, usual in plain.items() if settings.get(key, usual) != usual]
        return (*found, "through ROS") if self.result.header.get("ros") else tuple(found)


@dataclass(frozen=True)
class Beside:
    """One line of the comparison: a published number and ours of the same axis name.

    Attributes:
        benchmark: of the paper.
        axis, metric: as ours are named.
        paper: percent.
        ours: (checkpoint, task or None, rate or percent) each; empty: not measured.
        why_not: why the two may not be compared; empty where there is no world of ours.
    """

    benchmark: str
    axis: str
    metric: str
    paper: float
    ours: tuple[tuple[str, str | None, Rate | float], ...]
    why_not: str


def stored_results(folder: Path) -> list[Stored]:
    """Every result file below ``<checkpoint>.results`` folders, in the order of their names."""
    found = []
    for path in sorted(folder.glob("*.results/**/*.json*")):
        if is_result(path):
            below = path.relative_to(folder)
            inner = tuple(part for part in below.parts[1:-1] if part != OF_SUITES)
            owner = below.parts[0].removesuffix(".results") + (f" ({'/'.join(inner)})" if inner else "")
            found.append(Stored(below.as_posix(), owner, read_result(path)))
    return found


def read_published(path: Path = PUBLISHED) -> dict[str, Any]:
    """The paper's numbers.

    Raises:
        UserError: a suite, or a world of ours, that does not exist is named, or a number is no percentage.
    """
    published = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    for benchmark in published["benchmarks"]:
        twin = benchmark["twin"]
        if twin is not None and twin not in SUITES:
            raise UserError(f"{path.name}: benchmark '{benchmark['name']}': twin {twin} is no suite")
        for entry in benchmark["results"]:
            for key in ("value", "base", "sft"):
                if not 0 <= entry.get(key, 0.0) <= 100:
                    raise UserError(f"{path.name}: {benchmark['name']}, {entry['axis']}: {key} is no percentage")
    return published


def compare(published: Mapping[str, Any], stored: Sequence[Stored]) -> list[Beside]:
    """The published numbers in their order, each with ours where there is a world of the same question.

    Where a checkpoint has a result of the suite itself, older ones of the same world are left out: axes are compared
    within one run.
    """
    lines = []
    plain = [item for item in stored if not item.unusual and "(" not in item.checkpoint]
    of_suites = {(item.checkpoint, item.suite) for item in plain if item.result.suite == item.suite}
    for benchmark in published["benchmarks"]:
        for entry in benchmark["results"]:
            ours: list[tuple[str, str | None, Rate | float]] = []
            for item in plain:
                older = item.result.suite != item.suite and (item.checkpoint, item.suite) in of_suites
                if item.suite == benchmark["twin"] and not older:
                    ours += [(item.checkpoint, *value) for value in _ours(item.result, entry["axis"], entry["metric"])]
            why_not = " ".join(str(benchmark.get("why_not", "")).split())
            lines.append(
                Beside(benchmark["name"], entry["axis"], entry["metric"], entry["value"], tuple(ours), why_not)
            )
    return lines


def _ours(result: Result, axis: str, metric: str) -> Iterable[tuple[str | None, Rate | float]]:
    """(task, value) of every task of an axis; all OOD axes together are one line."""
    cells: list[tuple[str | None, list[dict[str, Any]]]]
    if axis == ALL_OOD:
        axes = [name for name in result.axes if name != IN_DISTRIBUTION]
        cells = [(None, [row for name in axes for row in result.of(name)])]
    else:
        cells = [(task, result.of(axis, task)) for task in result.tasks(axis)]
    for task, rows in cells:
        values = [_measured(row, metric) for row in rows]
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            continue
        if all(value in (0.0, 1.0) for value in known):
            yield task, Rate(int(sum(known)), len(known))
        else:
            yield task, 100 * sum(known) / len(known)


def _measured(row: Mapping[str, Any], metric: str) -> float | None:
    value = row["success"] if metric == "success" else row["metrics"].get(metric)
    return None if value is None else float(value)


def parameters(checkpoint: Path) -> int:
    """Numbers in a checkpoint's weights, from the headers of its files."""
    count = 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for length in tensor["shape"]:
                    size *= length
                count += size
    return count


def page(checkpoints: Path, benchmarks: Path, picture: str) -> str:
    """The whole page.

    Args:
        checkpoints: folder with ``<name>`` and ``<name>.results``.
        benchmarks: folder with stored benchmark results; those of suites are in ``suites``.
        picture: how the page names its plot.
    """
    published, stored = read_published(), stored_results(checkpoints)
    lines = compare(published, stored)
    small = ", ".join(
        f"`{name}` {parameters(checkpoints / name) / 1e6:.1f} M"
        for name in dict.fromkeys(item.checkpoint for item in stored)
        if (checkpoints / name).is_dir()
    )
    parts = [
        "# Results\n",
        "Generated by `qwen-vla eval results` from the stored result files and "
        "[published.yaml](../qwen_vla_core/evaluation/published.yaml); a test compares the two. Do not edit.\n",
        "Three things are on this page, and they are not the same:\n\n"
        f"- **Paper**: what the authors of Qwen-VLA published ({published['paper']}; {published['readme']}), in "
        "percent, for a 4B backbone with a 1.15B decoder on real robots and public benchmarks. Nothing of it was "
        "measured here.\n"
        f"- **Ours**: what this repository's small models do in its own simulated worlds ({small} parameters), with "
        "counts and 95 % intervals (Wilson; anytime-valid where a run stopped early).\n"
        "- **Comparable**: no line is. Where an axis has the same name it asks the same kind of question; above each "
        "table stands what differs. A number of ours on a public benchmark would stand beside the paper's as "
        "comparable; there is none, because no checkpoint here was trained on one ([suites.md](suites.md) says which "
        "simulators run).\n",
        f"![Axes of the same name: ours and the paper's, in panels of their own]({picture})\n",
        "## The same axis names, side by side\n",
        "Axes are compared within one run: where a checkpoint has a result of the suite itself, older ones of the same "
        "world stand only in the table of every stored result.\n",
        _beside_tables(lines),
        "## Published benchmarks without a world of ours\n",
        _paper_only(published),
        "## Stages\n",
        _stages(published),
        "## Every stored result of ours\n",
        _stored_table(stored),
        "## Foreign simulators: one episode each with random weights\n",
        _suite_runs(benchmarks / "suites"),
    ]
    return "\n".join(parts)


def _beside_tables(lines: Sequence[Beside]) -> str:
    parts = []
    for name in dict.fromkeys(line.benchmark for line in lines if line.why_not):
        of = [line for line in lines if line.benchmark == name]
        parts.append(f"### {name}\n\nNot comparable: {of[0].why_not}\n")
        parts.append("| axis | metric | paper (theirs) | ours | comparable |\n|---|---|---:|---|---|")
        for line in of:
            parts.append(f"| {line.axis} | {line.metric} | {line.paper:.1f} % | {_told(line)} | no |")
        parts.append("")
    return "\n".join(parts)


def _told(line: Beside) -> str:
    if not line.ours:
        return "not measured"
    return "<br>".join(
        f"{checkpoint}{f', {task}' if task else ''}: {_rate(value)}" for checkpoint, task, value in line.ours
    )


def _rate(value: Rate | float) -> str:
    if isinstance(value, Rate):
        low, high = value.interval
        return f"{value.successes}/{value.trials} = {value.value:.0%} [{low:.0%}, {high:.0%}]"
    return f"{value:.1f} % (mean)"


def _paper_only(published: Mapping[str, Any]) -> str:
    rows = ["| benchmark | axis | metric | paper (theirs) | ours | adapter |", "|---|---|---|---:|---|---|"]
    for benchmark in published["benchmarks"]:
        if benchmark["twin"] is None:
            adapter = f"`--suite {benchmark['suite']}`" if benchmark["suite"] in SUITES else "none: a real robot"
            rows += [
                f"| {benchmark['name']} | {entry['axis']} | {entry['metric']} | {entry['value']:.1f} % | "
                f"not measured | {adapter} |"
                for entry in benchmark["results"]
            ]
    return "\n".join(rows) + "\n"


def _stages(published: Mapping[str, Any]) -> str:
    rows = [
        "The paper's numbers (theirs) after each stage of training; what stages bring to our small models is in",
        "[training.md](training.md).\n",
        "| benchmark | metric | continued pretraining | fine-tuning | reinforcement learning |",
        "|---|---|---:|---:|---:|",
    ]
    for benchmark in published["benchmarks"]:
        for entry in benchmark["results"]:
            if "base" in entry:
                middle = f"{entry['sft']:.1f} %" if "sft" in entry else "–"
                rows.append(
                    f"| {benchmark['name']} | {entry['metric']} | {entry['base']:.1f} % | {middle} | "
                    f"{entry['value']:.1f} % |"
                )
    return "\n".join(rows) + "\n"


def _stored_table(stored: Sequence[Stored]) -> str:
    rows = ["| checkpoint | suite | axis, task | success | means | settings | file |", "|---|---|---|---|---|---|---|"]
    for item in stored:
        for line in axis_table(item.result):
            low, high = line.interval
            rate = f"{line.rate.successes}/{line.rate.trials} = {line.rate.value:.0%} [{low:.0%}, {high:.0%}]"
            means = ", ".join(f"{name} {value:.2f}" for name, value in line.metrics.items())
            rows.append(
                f"| {item.checkpoint} | {item.suite} | {line.axis}, {line.task or 'all'} | {rate} | {means or '–'} | "
                f"{', '.join(item.unusual) or 'plain'} | {item.name} |"
            )
    return "\n".join(rows) + "\n"


def _suite_runs(folder: Path) -> str:
    rows = [
        "Success means nothing here: the policy is random. What is shown is that simulator, adapter, embodiment and",
        "model work together (`python benchmarks/suites.py`). Seconds are of a shared 2-core machine without a GPU.\n",
        "| suite | trial | steps | frames that differ | make | reset | per step | versions | note |",
        "|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        run = json.loads(path.read_text(encoding="utf-8"))
        trial, seconds, steps = run["trial"], run["seconds"], run["control_steps"]
        thinking = seconds["per_inference"] * run["result"]["inferences"]
        stepping = (seconds["second_reset_and_episode"] - seconds["first_reset"] - thinking) / max(1, steps)
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        rows.append(
            f"| {run['suite']} | {trial['axis']}, {trial['task']} | {steps} | {run['different_frames']} | "
            f"{seconds['make_world']:.0f} s | {seconds['first_reset']:.1f} s | {1000 * max(0.0, stepping):.0f} ms | "
            f"{versions} | {run['note'] or '–'} |"
        )
    return "\n".join(rows) + "\n"
