from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Observation
from qwen_vla_core.model import checkpoint
from qwen_vla_core.model.checkpoint import PROCESSOR_FILES, load_checkpoint, read_config, save_checkpoint
from qwen_vla_core.model.policy import QwenVLA

PARTS = ["config.json", "model.safetensors", "stats.json", "embodiments/aloha.yaml", *PROCESSOR_FILES]


@pytest.fixture
def folder(policy: QwenVLA, tmp_path: Path) -> Path:
    target = tmp_path / "deep" / "checkpoint"
    save_checkpoint(policy, target, provenance={"recipe": "none"})
    return target


def actions(policy: QwenVLA, observation: Observation) -> np.ndarray:
    return policy.predict(observation, generator=torch.Generator().manual_seed(9)).actions_hc


def edit(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_round_trip_predicts_bit_equal(policy: QwenVLA, folder: Path, observe: Callable[..., Observation]) -> None:
    again = load_checkpoint(folder)
    np.testing.assert_array_equal(actions(again, observe()), actions(policy, observe()))
    assert again.generate_text({}, "Where?", 4) == policy.generate_text({}, "Where?", 4)
    assert read_config(folder)["provenance"] == {"recipe": "none"}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoint"]
    save_checkpoint(again, folder)  # over an existing checkpoint
    assert actions(load_checkpoint(folder), observe()).tobytes() == actions(policy, observe()).tobytes()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoint"]


def test_half_precision_fits_eight_megabytes_and_hardly_changes(
    policy: QwenVLA, tmp_path: Path, observe: Callable[..., Observation]
) -> None:
    save_checkpoint(policy, tmp_path / "half", dtype=torch.float16)
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 8e6
    half = actions(load_checkpoint(tmp_path / "half"), observe())
    assert np.abs(half - actions(policy, observe())).max() < 0.02


@pytest.mark.parametrize("part", PARTS)
def test_every_missing_part_is_refused_by_name(folder: Path, part: str) -> None:
    (folder / part).unlink()
    with pytest.raises(UserError, match=part.replace(".", r"\.")):
        load_checkpoint(folder)


@pytest.mark.parametrize("part", ["stats.json", "embodiments/aloha.yaml", *PROCESSOR_FILES])
def test_every_changed_part_is_refused_by_name(folder: Path, part: str) -> None:
    with (folder / part).open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=part.replace(".", r"\.")):
        load_checkpoint(folder)


def test_weights_of_another_checkpoint_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"weights_id": "another"})
    with pytest.raises(UserError, match="weights_id"):
        load_checkpoint(folder)


@pytest.mark.parametrize("damage", ["lacks", "unknown", "shape", "truncated"])
def test_damaged_weights_are_refused_by_name(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    weights, name = load_file(path), "decoder.context_in.weight"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
        name = "model.safetensors"
    else:
        if damage == "lacks":
            del weights[name]
        elif damage == "unknown":
            weights["extra"], name = torch.zeros(1), "extra"
        else:
            weights[name] = torch.zeros(2, 2)
        save_file(weights, path, metadata={"weights_id": read_config(folder)["weights_id"]})
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c.pop("stats_sha256"), "stats_sha256"),
        (lambda c: c.update(format="other/9"), "format"),
        (lambda c: c["model"].update(colour="red"), r"model\.colour"),
        (lambda c: c["model"]["decoder"].update(dropout=0.1), r"model\.decoder\.dropout"),
        (lambda c: c["model"]["decoder"].pop("width"), r"model\.decoder\.width"),
        (lambda c: c["model"].update(state_mode="telepathy"), "state_mode"),
        (lambda c: c["model"]["decoder"].update(context="both"), r"decoder\.context"),
        (lambda c: c["model"]["flow"].update(tau="uniform"), r"flow\.tau"),
        (lambda c: c["model"]["flow"].update(toward="both"), r"flow\.toward"),
        (lambda c: c["model"]["flow"].update(steps=0), r"flow\.steps"),
    ],
)
def test_a_wrong_config_is_refused_by_key(folder: Path, change: Callable[[dict], object], message: str) -> None:
    edit(folder / "config.json", change)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


def test_a_failed_save_leaves_the_old_checkpoint_and_no_rubbish(
    policy: QwenVLA, folder: Path, monkeypatch: pytest.MonkeyPatch, observe: Callable[..., Observation]
) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="space"):
        save_checkpoint(policy, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    np.testing.assert_array_equal(actions(load_checkpoint(folder), observe()), actions(policy, observe()))


def test_a_foreign_folder_is_never_overwritten(policy: QwenVLA, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a checkpoint"):
        save_checkpoint(policy, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
