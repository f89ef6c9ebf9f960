"""RxR in continuous environments: long instructions in English, Hindi and Telugu for walks through Matterport3D houses.

Source: RxR_VLNCE_v0 of github.com/jacobkrantz/VLN-CE (RxR itself: github.com/google-research-datasets/RxR, CC BY 4.0;
Matterport3D's terms of use for the houses); layout in ``vln_ce``, files ``<split>_{guide,follower}.json.gz``, and in
``instruction`` also ``instruction_id``, ``language`` (en-US, en-IN, hi-IN, te-IN), ``annotator_id`` and
``timed_instruction``. One action is 0.25 m or a turn of 30°; looking up and down costs no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qwen_vla_core.data.action_job import option
from qwen_vla_core.data.vln_ce import add_arguments as add_shared
from qwen_vla_core.data.vln_ce import convert_walks
from qwen_vla_core.errors import UserError

TURN_DEG = 30.0
LANGUAGES = ("en-US", "en-IN", "hi-IN", "te-IN")


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """SRC is ``<split>_guide.json.gz`` or ``<split>_follower.json.gz``."""
    add_shared(parser, TURN_DEG)
    parser.add_argument("--languages", nargs="+", metavar="L", help=f"of {', '.join(LANGUAGES)} (default: all)")


def convert(src: Path, out: Path, options: Any, workers: int, progress: bool) -> dict[str, Any]:
    """One episode per instruction; see ``convert_walks``."""
    languages = tuple(option(options, "languages", ()))
    unknown = sorted(set(languages) - set(LANGUAGES))
    if unknown:
        raise UserError(f"--languages {unknown[0]}: use some of {', '.join(LANGUAGES)}")
    source = {
        "name": "rxr_ce",
        "licence": "instructions CC BY 4.0; houses: Matterport3D terms of use",
        "layout": "RxR-Habitat v0",
        "languages": list(languages or LANGUAGES),
    }
    return convert_walks(
        Path(src), Path(out), options, workers, progress, turn_deg=TURN_DEG, source=source, about=_about,
        wanted=partial(_speaks, languages),
    )  # fmt: skip


def _speaks(languages: tuple[str, ...], episode: Mapping[str, Any]) -> bool:
    return not languages or _instruction(episode).get("language") in languages


def _about(episode: Mapping[str, Any]) -> dict[str, Any]:
    told, info = _instruction(episode), episode.get("info")
    return {
        "language": told.get("language"),
        "instruction_id": told.get("instruction_id"),
        "annotator_id": told.get("annotator_id"),
        "role": info.get("role") if isinstance(info, dict) else None,
    }


def _instruction(episode: Mapping[str, Any]) -> Mapping[str, Any]:
    told = episode.get("instruction")
    return told if isinstance(told, dict) else {}
