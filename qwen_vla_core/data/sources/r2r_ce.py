"""R2R in continuous environments: English instructions for short walks through Matterport3D houses.

Source: R2R_VLNCE_v1-3_preprocessed of github.com/jacobkrantz/VLN-CE (MIT code; Matterport3D's terms of use for the
houses); layout in ``vln_ce``. One action is 0.25 m or a turn of 15°.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vla_core.data.vln_ce import add_arguments as add_shared
from qwen_vla_core.data.vln_ce import convert_walks

TURN_DEG = 15.0


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """SRC is ``<split>.json.gz``."""
    add_shared(parser, TURN_DEG)


def convert(src: Path, out: Path, options: Any, workers: int, progress: bool) -> dict[str, Any]:
    """One episode per instruction; see ``convert_walks``."""
    source = {"name": "r2r_ce", "licence": "Matterport3D terms of use", "layout": "VLN-CE v1-3"}
    return convert_walks(
        Path(src), Path(out), options, workers, progress, turn_deg=TURN_DEG, source=source, about=_about
    )


def _about(episode: Mapping[str, Any]) -> dict[str, Any]:
    return {"language": "en"}
