"""A state survives whatever happens while it is written, and nothing damaged or foreign is ever restored."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwen_vla_core.errors import UserError
from qwen_vla_core.training import shards, state
from qwen_vla_core.training.state import Average, latest, read_progress, restore_state, save_state

torch.set_num_threads(1)

PROGRESS = {"stage": "cpt", "recipe": {"optim": {"rate": 1e-3, "betas": [0.9, 0.95]}}, "mixture": "abc"}
Learner = tuple[nn.Module, torch.optim.AdamW, Average]


class Tied(nn.Module):
    """A frozen vector, a tied matrix and a buffer that belongs to the weights."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.last = nn.Linear(4, width, bias=False)
        self.last.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.first(x)) + self.last(x)


def fresh(width: int = 6) -> Learner:
    torch.manual_seed(1)
    model = Tied(width)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return model, optimizer, Average(model, 0.9)


def learn(learner: Learner, first: int, last: int) -> Learner:
    model, optimizer, average = learner
    for step in range(first, last):
        data = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        model(data).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step)
    return learner


def assert_equal(one: Learner, other: Learner) -> None:
    for mine, theirs in zip(one[0].state_dict().items(), other[0].state_dict().items(), strict=True):
        assert mine[0] == theirs[0] and torch.equal(mine[1], theirs[1]), mine[0]
    assert one[2].tensors.keys() == other[2].tensors.keys()
    for name, value in one[2].tensors.items():
        assert torch.equal(value, other[2].tensors[name]), name
    mine_state, their_state = one[1].state_dict()["state"], other[1].state_dict()["state"]
    assert mine_state.keys() == their_state.keys()
    for number, moments in mine_state.items():
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in moments.items():
            assert torch.equal(value, their_state[number][key]), (number, key)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "state").iterdir())


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    learner = learn(fresh(), 0, 3)
    save_state(tmp_path, 3, *learner, PROGRESS)
    resumed = fresh()
    assert restore_state(tmp_path, *resumed, PROGRESS) == 3
    assert_equal(learn(resumed, 3, 7), learn(learner, 3, 7))
    assert "first.bias" not in learner[2].tensors  # frozen: its own average


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert restore_state(tmp_path, *fresh(), PROGRESS) == 0


def test_the_last_two_stay_and_a_step_can_be_saved_again(tmp_path: Path) -> None:
    learner = fresh()
    for step in (1, 2, 3):
        learn(learner, step - 1, step)
        save_state(tmp_path, step, *learner, PROGRESS)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    save_state(tmp_path, 3, *learn(learner, 3, 4), PROGRESS)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    found = latest(tmp_path)
    assert found == tmp_path / "state" / "step_00000003"
    assert read_progress(found) == (3, PROGRESS)
    resumed = fresh()
    restore_state(tmp_path, *resumed, PROGRESS)
    assert_equal(resumed, learner)


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "FILE_BYTES", 200)
    learner = learn(fresh(), 0, 2)
    save_state(tmp_path, 2, *learner, PROGRESS)
    assert len(list((tmp_path / "state" / "step_00000002").glob("*.safetensors"))) > 2
    resumed = fresh()
    restore_state(tmp_path, *resumed, PROGRESS)
    assert_equal(resumed, learner)


def test_no_pickle_on_the_disk(tmp_path: Path) -> None:
    save_state(tmp_path, 1, *learn(fresh(), 0, 1), PROGRESS)
    assert {path.suffix for path in (tmp_path / "state" / "step_00000001").iterdir()} == {".json", ".safetensors"}


def test_average_in_place_and_back() -> None:
    model, _, average = learn(fresh(), 0, 3)
    trained = {name: value.clone() for name, value in model.named_parameters()}
    with average.applied_to(model):
        assert not torch.equal(model.get_parameter("first.weight"), trained["first.weight"])
        inside = model.get_parameter("first.weight").detach().clone()
    assert torch.equal(inside, average.tensors["first.weight"])
    assert all(torch.equal(value, trained[name]) for name, value in model.named_parameters())


# ---- foreign ------------------------------------------------------------------------------------------------------


def test_another_recipe_is_refused_by_key(tmp_path: Path) -> None:
    save_state(tmp_path, 1, *learn(fresh(), 0, 1), PROGRESS)
    other = json.loads(json.dumps(PROGRESS))
    other["recipe"]["optim"]["rate"] = 1e-4
    del other["mixture"]
    with pytest.raises(UserError) as caught:
        restore_state(tmp_path, *fresh(), other)
    assert str(caught.value) == (
        f'{tmp_path}/state/step_00000001: belongs to another run (mixture: "abc" then, absent now; recipe.optim.rate: '
        "0.001 then, 0.0001 now): use another --out, or the old values"
    )


def test_another_model_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, 1, *learn(fresh(), 0, 1), PROGRESS)
    with pytest.raises(UserError, match=r"another model \(weight.first.weight is \(6, 4\), this model's is \(8, 4\)\)"):
        restore_state(tmp_path, *fresh(8), PROGRESS)
    model, optimizer, average = fresh()
    model.add_module("extra", nn.Linear(2, 2))
    with pytest.raises(
        UserError, match=r"another model \(weight.extra.bias is only in this model\): use another --out"
    ):
        restore_state(tmp_path, model, optimizer, average, PROGRESS)
    model, _, _ = fresh()
    model.get_parameter("first.weight").requires_grad_(False)
    trained = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(UserError, match=r"another model \(average.first.weight is only in the state\)"):
        restore_state(tmp_path, model, trained, Average(model, 0.9), PROGRESS)


# ---- damaged ------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    learner = learn(fresh(), 0, 2)
    save_state(tmp_path, 1, *learner, PROGRESS)
    save_state(tmp_path, 2, *learner, PROGRESS)
    folder = tmp_path / "state" / "step_00000002"
    flipped = 0
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for position in range(0, len(good), max(1, len(good) // 60)):
            path.write_bytes(good[:position] + bytes([good[position] ^ 0x11]) + good[position + 1 :])
            with pytest.raises(UserError) as caught:
                restore_state(tmp_path, *fresh(), PROGRESS)
            assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
            flipped += 1
        path.write_bytes(good)
    assert flipped > 150
    assert restore_state(tmp_path, *fresh(), PROGRESS) == 2


def test_a_damaged_state_says_what_to_delete(tmp_path: Path) -> None:
    learner = learn(fresh(), 0, 2)
    save_state(tmp_path, 1, *learner, PROGRESS)
    save_state(tmp_path, 2, *learner, PROGRESS)
    folder = tmp_path / "state" / "step_00000002"
    (piece,) = folder.glob("*.safetensors")
    data = bytearray(piece.read_bytes())
    data[-3] ^= 1
    piece.write_bytes(bytes(data))
    with pytest.raises(UserError) as caught:
        restore_state(tmp_path, *fresh(), PROGRESS)
    assert f"{piece}: damaged (" in str(caught.value) and "does not match its checksum" in str(caught.value)
    assert str(caught.value).endswith(f"; delete {folder} to resume from step_00000001")
    piece.unlink()
    with pytest.raises(UserError, match=rf"{piece.name}: damaged \(.*No such file"):
        restore_state(tmp_path, *fresh(), PROGRESS)
    shutil.rmtree(folder)
    assert restore_state(tmp_path, *fresh(), PROGRESS) == 1


# ---- interrupted --------------------------------------------------------------------------------------------------


def interrupting(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], Any]) -> list[str]:
    """Calls ``action`` instead of the number-th sync or rename; returns the log of all of them."""
    seen: list[str] = []

    def around(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) == number + 1:
                action()
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "rename", "replace", "rmdir"):
        around(name)
    return seen


def events(tmp_path: Path) -> int:
    """How many syncs, renames and removals the third save takes."""
    out = tmp_path / "counted"
    learner = learn(fresh(), 0, 2)
    save_state(out, 1, *learner, PROGRESS)
    save_state(out, 2, *learner, PROGRESS)
    with pytest.MonkeyPatch.context() as patched:
        seen = interrupting(patched, -1, lambda: None)
        save_state(out, 3, *learner, PROGRESS)
    assert seen.count("rename") == 2 and seen.count("rmdir") == 1 and seen.count("fsync") >= 5
    return len(seen)


def check_after(out: Path, before: Learner, after: Learner, message: str) -> int:
    """What is restored is complete: the state before or the one after; the next save works and tidies up."""
    resumed = fresh()
    step = restore_state(out, *resumed, PROGRESS)
    assert step in (2, 3), message
    assert_equal(resumed, before if step == 2 else after)
    save_state(out, 4, *learn(resumed, step, 4), PROGRESS)
    assert names(out)[-1] == "step_00000004" and len(names(out)) == 2, (message, names(out))
    return step


def saved_twice(out: Path) -> tuple[Learner, Learner]:
    before = learn(fresh(), 0, 2)
    save_state(out, 1, *learn(fresh(), 0, 1), PROGRESS)
    save_state(out, 2, *before, PROGRESS)
    return before, learn(fresh(), 0, 3)


def test_killed_at_any_moment_of_saving(tmp_path: Path) -> None:
    """A real SIGKILL before each sync, rename and removal."""
    outcomes = []
    for number in range(events(tmp_path)):
        out = tmp_path / str(number)
        before, after = saved_twice(out)
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patched:
                interrupting(patched, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                save_state(out, 3, *after, PROGRESS)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        outcomes.append(check_after(out, before, after, f"killed before event {number}"))
    assert outcomes == sorted(outcomes) and {2, 3} == set(outcomes)


def test_full_disk_at_any_moment_of_saving(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    outcomes = []
    for number in range(events(tmp_path)):
        out = tmp_path / str(number)
        before, after = saved_twice(out)
        with pytest.MonkeyPatch.context() as patched:
            interrupting(patched, number, full)
            with pytest.raises(UserError) as caught:
                save_state(out, 3, *after, PROGRESS)
        text = str(caught.value)
        assert "cannot write the training state: No space left on device; the last good state is " in text
        assert "\n" not in text and str(latest(out)) in text
        assert not list((out / "state").glob("*.partial")), "the unfinished state takes the space that is missing"
        outcomes.append(check_after(out, before, after, f"full at event {number}"))
    assert {2, 3} == set(outcomes)


def test_first_state_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state, "write_pieces", full)
    with pytest.raises(UserError, match="No space left on device; there is no earlier state: fix that and run again"):
        save_state(tmp_path, 1, *fresh(), PROGRESS)
