"""What the columns of an RLDS corpus mean, as a small YAML: slices → channel groups and units, pictures → views.

Shipped mappings lie in ``config/rlds``; ``qwen-vla data convert … --from rlds --mapping FILE`` takes any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwen_vla_core.actions.rotations import pose_size
from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.embodiment.errors import did_you_mean
from qwen_vla_core.embodiment.parse import NodeParser
from qwen_vla_core.embodiment.spec import CONVENTION_KINDS, UNITS_BY_KIND, Convention, GroupKind, PromptSpec, doc
from qwen_vla_core.embodiment.yamlpos import compose, read_text
from qwen_vla_core.errors import UserError
from qwen_vla_core.resources import resource_dir

Change = Literal["none", "open_is_zero", "binary", "closing"]


@dataclass(frozen=True)
class ColumnSpec:
    """A slice of a step's feature."""

    key: str = field(metadata=doc("Feature below `steps/`, e.g. observation/state."))
    columns: tuple[int, int] | None = field(
        default=None, metadata=doc("[first, end) of its flattened values; default: all.", minimum=0)
    )
    scale: float = field(default=1.0, metadata=doc("Factor to the channel's unit."))


@dataclass(frozen=True)
class GroupSpec:
    """One channel group."""

    name: str = field(metadata=doc("Group name."))
    kind: GroupKind = field(metadata=doc("What the channels are."))
    unit: str = field(metadata=doc("As in an embodiment YAML, e.g. 'm,euler_xyz'."))
    channels: tuple[str, ...] = field(metadata=doc("Channel names, in the order of the values."))
    source: tuple[ColumnSpec, ...] = field(metadata=doc("Where the values come from, one after the other."))
    change: Change = field(
        default="none",
        metadata=doc(
            "Grippers: open_is_zero (1 − value), binary (intermediate values become what follows them), "
            "closing (+1 closes, −1 opens, 0 keeps → opening fraction)."
        ),
    )


@dataclass(frozen=True)
class ViewSpec:
    """One camera."""

    view: str = field(metadata=doc("View name; becomes boundary tokens."))
    key: str = field(metadata=doc("Feature below `steps/`, e.g. observation/image."))


@dataclass(frozen=True)
class RldsMapping:
    """A corpus."""

    datasets: tuple[str, ...] = field(metadata=doc("TFDS names it fits (`name` in dataset_info.json)."))
    prompt: PromptSpec = field(metadata=doc("Fields of the embodiment prompt."))
    frequency_hz: float = field(metadata=doc("Control frequency of the recordings.", exclusive_minimum=0.0))
    convention: Convention = field(metadata=doc("Action convention."))
    instruction: tuple[str, ...] = field(
        metadata=doc("Features below `steps/` that may hold the instruction; the first with text counts.")
    )
    views: tuple[ViewSpec, ...] = field(metadata=doc("Cameras in model order."))
    action: tuple[GroupSpec, ...] = field(metadata=doc("Action groups in column order."))
    state: tuple[GroupSpec, ...] = field(default=(), metadata=doc("State groups in column order."))
    horizon: int = field(default=16, metadata=doc("H, actions per chunk.", minimum=1))
    skip_first: int = field(default=0, metadata=doc("Steps without meaning at the start of every episode.", minimum=0))
    keep_last: bool = field(
        default=False, metadata=doc("Whether the last step's action means something; RLDS does not promise it.")
    )
    licence: str = field(default="", metadata=doc("Of the corpus, for the sidecar."))
    description: str = field(default="", metadata=doc("For humans: where the facts come from."))
    file: str = field(default="<mapping>", compare=False, metadata=doc("", internal=True))

    @property
    def contract(self) -> DataContract:
        """Of the converted dataset, with all views."""
        groups = {
            side: tuple(ChannelGroup(g.name, g.kind, g.unit, g.channels) for g in specs)
            for side, specs in (("state", self.state), ("action", self.action))
        }
        return DataContract(
            prompt=self.prompt,
            frequency_hz=self.frequency_hz,
            horizon=self.horizon,
            convention=self.convention,
            views=tuple(view.view for view in self.views),
            **groups,
        )


def shipped_mappings() -> dict[str, Path]:
    """Name → file of the mappings that ship."""
    return {path.stem: path for path in sorted((resource_dir("config") / "rlds").glob("*.yaml"))}


def load_mapping(name: str) -> RldsMapping:
    """A shipped mapping by name, or any by path.

    Raises:
        UserError: there is none, or it is wrong; names line, key and fix.
    """
    path = shipped_mappings().get(name, Path(name))
    source = str(path)
    if not path.is_file():
        raise UserError(f"--mapping {name}: {did_you_mean(name, tuple(shipped_mappings()))}, or a YAML file")
    parser = NodeParser(source)
    mapping = parser.dataclass(RldsMapping, compose(read_text(path, source), source), "")
    _check(mapping, parser)
    return RldsMapping(**{**vars(mapping), "file": source})


def mapping_for(dataset: str) -> RldsMapping:
    """The shipped mapping of a TFDS name.

    Raises:
        UserError: none fits.
    """
    for name in shipped_mappings():
        mapping = load_mapping(name)
        if dataset in mapping.datasets:
            return mapping
    raise UserError(
        f"no shipped mapping fits '{dataset}'; write one like {next(iter(shipped_mappings().values()))} and name it "
        "with --mapping"
    )


def _check(mapping: RldsMapping, parser: NodeParser) -> None:
    for key in ("datasets", "instruction", "action"):
        if not getattr(mapping, key):
            parser.fail(key, "is empty", f"name at least one of {key}")
    for side, groups in (("state", mapping.state), ("action", mapping.action)):
        channels: set[str] = set()
        for i, group in enumerate(groups):
            key = f"{side}[{i}]"
            if group.unit not in UNITS_BY_KIND[group.kind]:
                parser.fail(f"{key}.unit", f"'{group.unit}' does not fit {group.kind}", _one_of(group.kind))
            if not group.channels or len(set(group.channels) | channels) < len(group.channels) + len(channels):
                parser.fail(f"{key}.channels", "empty, or a name that is there already", "name each channel once")
            if group.kind in ("eef_pose", "eef_delta") and len(group.channels) != pose_size(group.unit):
                parser.fail(
                    f"{key}.channels",
                    f"{len(group.channels)} channels, but a pose in '{group.unit}' has {pose_size(group.unit)}",
                    "make one group per pose",
                )
            if not group.source:
                parser.fail(f"{key}.source", "is empty", "name the feature that holds the values")
            if group.change != "none" and (group.kind, group.unit) != ("gripper", "fraction"):
                parser.fail(f"{key}.change", "is for grippers in fraction", "remove it")
            for j, part in enumerate(group.source):
                if part.columns is not None and part.columns[0] >= part.columns[1]:
                    parser.fail(f"{key}.source[{j}].columns", "ends before it starts", "write [first, end)")
                if not math.isfinite(part.scale) or part.scale == 0:
                    parser.fail(f"{key}.source[{j}].scale", "is no factor", "use a number other than 0")
            channels |= set(group.channels)
    needed = CONVENTION_KINDS[mapping.convention][0]
    if needed not in {group.kind for group in mapping.action}:
        parser.fail("convention", f"{mapping.convention} needs a group of kind {needed}", "change it or the group")
    views = [view.view for view in mapping.views]
    for i, view in enumerate(views):
        if view in views[:i]:
            parser.fail(f"views[{i}].view", f"'{view}' is there already", "name each view once")


def _one_of(kind: str) -> str:
    return f"use one of: {', '.join(repr(unit) for unit in UNITS_BY_KIND[kind])}"
