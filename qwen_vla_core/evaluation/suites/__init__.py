"""Benchmark suites by name; a suite's module is imported when it is asked for, its simulator when a world is made."""

from __future__ import annotations

import importlib

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.suites.protocol import Suite

# name → (module, class); one line per suite.
SUITES: dict[str, tuple[str, str]] = {
    "aloha": ("qwen_vla_core.evaluation.suites.aloha", "AlohaSuite"),
    "widowx": ("qwen_vla_core.evaluation.suites.widowx", "WidowXSuite"),
    "navigation": ("qwen_vla_core.evaluation.suites.navigation", "NavigationSuite"),
    "belt": ("qwen_vla_core.evaluation.suites.belt", "BeltSuite"),
    # Foreign simulators (docs/suites.md)
    "libero": ("qwen_vla_core.evaluation.suites.libero", "LiberoSuite"),
    "simpler_widowx": ("qwen_vla_core.evaluation.suites.simpler_widowx", "SimplerWidowXSuite"),
    "robotwin": ("qwen_vla_core.evaluation.suites.robotwin", "RoboTwinSuite"),
    "domino": ("qwen_vla_core.evaluation.suites.domino", "DominoSuite"),
    "robocasa_gr1": ("qwen_vla_core.evaluation.suites.robocasa_gr1", "RoboCasaGr1Suite"),
    "r2r": ("qwen_vla_core.evaluation.suites.vln_ce", "R2RSuite"),
    "rxr": ("qwen_vla_core.evaluation.suites.vln_ce", "RxRSuite"),
}


def make_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SUITES:
        raise UserError(f"--suite {name}: use one of {', '.join(SUITES)}")
    module, kind = SUITES[name]
    suite: Suite = getattr(importlib.import_module(module), kind)()
    return suite
