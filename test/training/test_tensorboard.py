"""TensorBoard reads from our event files what the log says, also after a resumed run."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_vla_core.errors import UserError
from qwen_vla_core.training.tensorboard import TensorBoardLog

pytest.importorskip("tensorboard")


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_numbers_arrive_under_the_names_of_their_panel(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        log.row({"stage": "cpt", "step": 0, "loss": 2.0, "lr_decoder": 0.5, "grad_norm": 1.5, "mfu": None})
        log.row({"stage": "cpt", "step": 20, "loss": 1.0, "lr_decoder": 0.25, "grad_norm": float("nan"), "mfu": 0.5})
    assert scalars(tmp_path, "loss/loss/cpt") == [(0, 2.0), (20, 1.0)]
    assert scalars(tmp_path, "learning_rate/decoder/cpt") == [(0, 0.5), (20, 0.25)]
    assert scalars(tmp_path, "training/grad_norm/cpt") == [(0, 1.5)]
    assert scalars(tmp_path, "training/mfu/cpt") == [(20, 0.5)]


def test_a_resumed_run_replaces_the_steps_it_does_again(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        for step in range(5):
            log.row({"step": step, "loss": 10.0})
    # Readers go through the files by name, which begins with the second of their making: no two in the same second.
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.0.first")
    with TensorBoardLog(tmp_path, first_step=3) as log:
        log.row({"step": 3, "loss": 1.0})
    assert scalars(tmp_path, "loss/loss") == [(0, 10.0), (1, 10.0), (2, 10.0), (3, 1.0)]


def test_evaluations_bring_rates_metrics_and_the_film(tmp_path: Path) -> None:
    from PIL import Image

    film = tmp_path / "film.gif"
    frames = [Image.fromarray(np.full((6, 8, 3), shade, np.uint8)) for shade in (0, 128, 255)]
    frames[0].save(film, save_all=True, append_images=frames[1:])
    row = {
        "step": 7,
        "embodiment": "aloha",
        "task": "pick",
        "success": {"rate": 0.75},
        "metrics": {"spl": 0.5},
        "film": str(film),
    }
    with TensorBoardLog(tmp_path / "events") as log:
        log.evaluation(row)
        log.evaluation({**row, "step": 8, "film": str(tmp_path / "gone.gif")})
    events = tmp_path / "events"
    assert scalars(events, "evaluation/aloha_pick/success") == [(7, 0.75), (8, 0.75)]
    assert scalars(events, "evaluation/aloha_pick/spl") == [(7, 0.5), (8, 0.5)]
    (image,) = read(events).Images("evaluation/aloha_pick/film")
    assert (image.width, image.height, image.encoded_image_string) == (8, 6, film.read_bytes())


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("tensorboard"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'qwen_vla_ros\[train\]'"):
        TensorBoardLog(tmp_path / "events")
    assert not (tmp_path / "events").exists()
