"""Small corpora in the real layouts, for the tests of the vision-language converters."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(path: Path, width: int = 64, height: int = 48, seed: int = 0) -> Path:
    """Writes a picture of smooth noise in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(path)
    return path


def write_json(path: Path, value: Any, indent: int | None = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, values: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def convert(source: str, src: Path, out: Path, *flags: str, workers: int = 1) -> dict[str, Any]:
    """Runs a converter with its own command-line arguments."""
    module = importlib.import_module(f"qwen_vla_core.data.sources.{source}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.convert(src, out, parser.parse_args(list(flags)), workers, False)


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
