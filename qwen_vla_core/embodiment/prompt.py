"""The published embodiment sentence, byte for byte, and the view tokens that wrap each image."""

from __future__ import annotations

from qwen_vla_core.embodiment.spec import Embodiment, PromptSpec

PLAIN = "Picture"  # begins the name of a picture of no camera; with a blank after it, no view can be called so


def build_prompt(embodiment: Embodiment, instruction: str) -> str:
    """The text that conditions the policy [P].

    ``The robot is {robot_tag} with {single arm / dual arms}[, waist][, and mobile base]. The control frequency is {FPS}
    Hz. Please predict the next {chunk_size} control actions to execute the following task: {ori_instruction}.``

    A robot without arms, and one whose convention is waypoints, are worded analogously [O]: the paper does so for
    navigation but does not print the sentence.

    Args:
        embodiment: gives every field but the instruction.
        instruction: what the person asked for. White space is collapsed and a final full stop dropped, because the
            sentence brings its own: "pick up the cube." and "pick up the cube" must not be two prompts.

    Raises:
        ValueError: the instruction is empty.
    """
    control = embodiment.control
    return sentence(embodiment.prompt, control.frequency_hz, control.horizon, control.convention, instruction)


def sentence(prompt: PromptSpec, frequency_hz: float, horizon: int, convention: str, instruction: str) -> str:
    """``build_prompt`` from its fields, for data that carries them without a whole embodiment."""
    task = " ".join(instruction.split()).rstrip(".").rstrip()
    if not task:
        raise ValueError("the instruction is empty")
    if prompt.arms == "no arm":
        parts = [part for part, present in (("waist", prompt.waist), ("mobile base", prompt.mobile_base)) if present]
        body = " and ".join(parts) or "no arm"
    else:
        body = prompt.arms + (", waist" if prompt.waist else "") + (", and mobile base" if prompt.mobile_base else "")
    what = "control actions"
    if convention == "waypoint":
        what = "waypoints (forward, left and heading change from the current pose)"
    return (
        f"The robot is {prompt.robot_tag} with {body}. "
        f"The control frequency is {frequency_hz:g} Hz. "
        f"Please predict the next {horizon} {what} to execute the following task: {task}."
    )


def view_tokens(view: str) -> tuple[str, str]:
    """The boundary tokens of a view, ``<|ego_start|>`` and ``<|ego_end|>`` [P; O for views the paper does not name]."""
    return f"<|{view}_start|>", f"<|{view}_end|>"
