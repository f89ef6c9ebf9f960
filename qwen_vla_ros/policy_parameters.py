"""The parameters of the policy node, each described where it is declared."""

from __future__ import annotations

from typing import Any

from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, STRATEGIES
from qwen_vla_ros.engines import declare_engine
from qwen_vla_ros.node_utils import declare


def declare_policy(node: Any) -> None:
    """Declares them on a node, those of its engine included."""
    declare_engine(node)
    text = "Cleanup keeps the weights in memory for the next configure; false: it frees them"
    declare(node, "keep_weights", True, text)
    declare(node, "instruction", "", "Instruction at start; qwen_vla/instruction replaces it", read_only=True)
    declare(node, "autostart", False, "Configure and activate without being asked", read_only=True)
    text = f"How chunks follow each other: {', '.join(STRATEGIES)}. The controller node needs the same."
    declare(node, "strategy", DEFAULT_STRATEGY, text, read_only=True)
    text = "Actions between two looks, fewer where chunks would come too late; 0: as fast as it can; -1: the YAML's"
    declare(node, "execute_steps", -1, text, minimum=-1, maximum=1000)
    declare(node, "flow_steps", 0, "Euler steps of the sampler; 0: the checkpoint's", minimum=0, maximum=100)
    text = "Holding for longer than this is reported as a fault"
    declare(node, "fault_after_s", 5.0, text, minimum=0.1, maximum=3600.0)
    text = "A camera that sends bit-identical pictures for longer than this is frozen; 0: no such check (simulation)"
    declare(node, "frozen_after_s", 1.0, text, read_only=True, minimum=0.0, maximum=3600.0)
