"""The embodiment contract: one YAML file says what a robot is; see docs/embodiment.md."""

from __future__ import annotations

from qwen_vla_core.embodiment.compare import contract_difference
from qwen_vla_core.embodiment.errors import EmbodimentError
from qwen_vla_core.embodiment.layout import ActionLayout
from qwen_vla_core.embodiment.load import diagnose, load_embodiment, load_robot, parse_embodiment, shipped_embodiments
from qwen_vla_core.embodiment.prompt import build_prompt
from qwen_vla_core.embodiment.spec import Embodiment

__all__ = [
    "ActionLayout",
    "Embodiment",
    "EmbodimentError",
    "build_prompt",
    "contract_difference",
    "diagnose",
    "load_embodiment",
    "load_robot",
    "parse_embodiment",
    "shipped_embodiments",
]
