"""docs/add_a_robot.md, performed: its commands, its edits, and the output it promises, in its order."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot import LeRobotWriter
from qwen_vla_core.embodiment import load_embodiment, shipped_embodiments
from qwen_vla_core.embodiment.urdf import read_urdf

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "add_a_robot.md"
START_S = 60.0


@dataclass
class Step:
    """Commands of one block, the edits and the output that the page shows after them."""

    commands: list[str] = field(default_factory=list)
    edits: list[tuple[int, str, str]] = field(default_factory=list)
    output: list[str] = field(default_factory=list)


def steps() -> list[Step]:
    """The page in order. A row of the table of edits: line, what it says, what it becomes."""
    found: list[Step] = []
    for kind, block, row in re.findall(r"```(bash|text)\n(.*?)```|^(\| \d+ \|[^\n]*)$", PAGE.read_text(), re.S | re.M):
        if kind == "bash":
            found.append(Step(commands=block.splitlines()))
        elif kind == "text":
            found[-1].output += block.splitlines()
        else:
            line, old, new = (cell.strip().strip("`") for cell in row.strip("|").split("|"))
            found[-1].edits.append((int(line), old, new))
    return found


def record(yaml: str, folder: str) -> None:
    """What the reader has by then: a few demonstrations of the robot."""
    robot = load_embodiment(yaml)
    rng = np.random.default_rng(0)
    lower = np.concatenate([np.array(group.limits.lower) for group in robot.actions])
    upper = np.concatenate([np.array(group.limits.upper) for group in robot.actions])
    steps, views = 20, dict.fromkeys(robot.views, (64, 48))
    with LeRobotWriter(folder, DataContract.of(robot), family="manipulation", views=views) as writer:
        for _ in range(3):
            phase = rng.uniform(0, 6, len(lower)) + np.linspace(0, 4, steps + 1)[:, None]
            path = ((lower + upper) / 2 + 0.4 * (upper - lower) * np.sin(phase)).astype(np.float32)
            rows = EpisodeRows(
                state=path[:-1],
                action=path[1:],
                timestamp=np.arange(steps) / robot.control.frequency_hz,
                task=np.zeros(steps, np.int64),
                perturbed=np.zeros(steps, bool),
            )
            pictures = {view: rng.integers(60, 200, (steps, 48, 64, 3), np.uint8) for view in robot.views}
            writer.add_episode(rows, ["put the red block into the box"], pictures)


def run_command(command: str, background: list[subprocess.Popen[bytes]]) -> None:
    words, _, note = command.partition("#")
    program, *arguments = shlex.split(words)
    assert program == "qwen-vla", command
    if "background" in note:
        call = [sys.executable, "-m", "qwen_vla_core.cli", *arguments]
        with Path("up.log").open("wb") as log:
            background.append(subprocess.Popen(call, stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + START_S
        while "kinematic mock" not in Path("up.log").read_text():
            assert background[-1].poll() is None and time.monotonic() < deadline, Path("up.log").read_text()
            time.sleep(0.05)
        return
    if "my_dataset" in arguments and not Path("my_dataset").exists():
        record("reach7.yaml", "my_dataset")
    expected = re.search(r"exit (\d)", note)
    assert main(arguments) == (int(expected[1]) if expected else 0), command


def test_the_page_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs" / "examples").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "examples" / "reach7.urdf", tmp_path / "docs" / "examples")
    monkeypatch.chdir(tmp_path)
    background: list[subprocess.Popen[bytes]] = []
    done = 0
    try:
        for step in steps():
            done += len(step.commands)
            # A loaded machine may delay a message: what is heard live gets a second and a third chance.
            for chance in range(3):
                capsys.readouterr()
                for command in step.commands:
                    run_command(command, background)
                printed = "".join(capsys.readouterr())
                missing = [line for line in step.output if line not in printed]
                if not missing:
                    break
                assert chance < 2 and all("--live" in command for command in step.commands), (missing, printed)
            yaml = Path("reach7.yaml")
            for number, old, new in step.edits:
                lines = yaml.read_text().splitlines(keepends=True)
                assert lines[number - 1].count(old) == 1, lines[number - 1]
                lines[number - 1] = lines[number - 1].replace(old, new)
                yaml.write_text("".join(lines))
    except BaseException:
        if background:
            print(Path("up.log").read_text())
        raise
    finally:
        for process in background:
            process.terminate()
        ended = [process.wait(timeout=30) for process in background]
    assert done >= 8 and ended == [0]
    assert Path("reach7.png").stat().st_size > 10_000
    robots = [load_embodiment(name) for name in ("reach7.yaml", "from_graph.yaml")]
    assert robots[0].channels == robots[1].channels and robots[0].actions == robots[1].actions
    assert {c.topic for c in robots[0].cameras} == {c.topic for c in robots[1].cameras}


def test_the_example_is_none_of_the_shipped_robots() -> None:
    example = {joint.name for joint in read_urdf(ROOT / "docs" / "examples" / "reach7.urdf").joints}
    for name in shipped_embodiments():
        robot = load_embodiment(name)
        assert not example & {field for group in robot.state for field in group.fields}
