"""The resumable state of a run: weights, averages, optimizer moments and progress; on any number of ranks.

    OUT/state/step_00000400/
        state.json                       what run this is, how far, and the hash of every list of pieces
        rank_00000.json, …               which pieces of which tensors that rank wrote, with their hashes
        rank_00000.00000.safetensors, …  the pieces

A state is written under a hidden name and renamed when every rank has written and synced its part: whatever is killed
whenever, a folder ``step_…`` is complete. Older ones go only then. Nothing random is stored: samples and noise are pure
functions of the recipe's seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json, fsync
from qwen_vla_core.training.average import Average
from qwen_vla_core.training.distributed import first_error, place
from qwen_vla_core.training.shards import Piece, list_name, parse_pieces, read_pieces, write_pieces

__all__ = ["Average", "latest", "read_progress", "restore_state", "save_state", "whole_weights"]

FORMAT = "qwen_vla_state/1"
MANIFEST = "state.json"
KEEP = 2
_ABSENT = object()


def save_state(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    progress: Mapping[str, Any],
    keep: int = KEEP,
) -> None:
    """Writes the state after ``step`` steps; all ranks call it, into a folder that all of them see.

    Args:
        out: folder of the run; the state goes to ``out/state/step_…``.
        step: finished optimizer steps.
        model: whose named parameters and stored buffers are saved; not the wrapper that ``parallelise`` returned.
        optimizer: of those parameters.
        average: of those parameters.
        progress: JSON values that say which run this is (recipe, mixture); ``restore_state`` compares them.
        keep: number of complete states that stay.

    Raises:
        UserError: the state cannot be written (full disk); states before it stay as they are.
    """
    rank, world = place()
    root = out / "state"
    final, temporary = root / _name(step), root / f".{_name(step)}.partial"
    problem = _attempt(lambda: _fresh(root, temporary)) if rank == 0 else None
    problem = first_error(problem)
    if problem is None:
        tensors = _tensors(model, optimizer, average)
        problem = first_error(_attempt(lambda: write_pieces(temporary, tensors, rank, world)))
    if rank == 0:
        if problem is None:
            problem = _attempt(lambda: _complete(temporary, final, step, world, dict(progress), keep))
        if problem is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    problem = first_error(problem)
    if problem is not None:
        before = latest(out)
        good = f"the last good state is {before}" if before is not None else "there is no earlier state"
        raise UserError(f"{final}: cannot write the training state: {problem}; {good}: fix that and run again")


def latest(out: Path) -> Path | None:
    """The newest complete state of a run; None when there is none yet."""
    found = _complete_states(out / "state")
    return found[-1] if found else None


def read_progress(folder: Path) -> tuple[int, dict[str, Any]]:
    """Finished steps and the ``progress`` that a state was saved with.

    Raises:
        UserError: the state is damaged, or of another version.
    """
    manifest = _manifest(folder)
    return int(manifest["step"]), dict(manifest["progress"])


def restore_state(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    progress: Mapping[str, Any],
) -> int:
    """Restores the newest state of a run into freshly built parts; all ranks call it, however many wrote it.

    Args:
        out: folder of the run.
        model: as given to ``save_state``: built alike, frozen alike, already spread over the ranks.
        optimizer: its state is replaced.
        average: its tensors are filled.
        progress: what ``save_state`` would be given now; another recipe or other data are refused.

    Returns:
        Finished steps; 0 where there is no state.

    Raises:
        UserError: a part is damaged, the state belongs to another model, or ``progress`` differs.
    """
    folder = latest(out)
    if folder is None:
        return 0
    # One rank's failure has to stop all of them.
    found: list[int] = []
    problem = _attempt(lambda: found.append(_restore(folder, model, optimizer, average, progress)))
    problem = first_error(problem)
    if problem is not None:
        raise UserError(problem)
    return found[0]


def whole_weights(model: nn.Module, average: Average | None = None) -> dict[str, torch.Tensor]:
    """Every parameter in one piece on the CPU, averaged where ``average`` has it; empty on all ranks but the first.

    All ranks call it, because slices have to travel.
    """
    rank, _ = place()
    weights = {}
    for name, value in model.named_parameters():
        tensor = average.tensors.get(name, value) if average is not None else value
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if rank == 0:
            weights[name] = tensor.to("cpu", copy=True)
    return weights


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _attempt(action: Any) -> str | None:
    """Runs it; the reason, in one line, why it failed, or None."""
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error}"
    except UserError as error:
        return str(error)
    return None


def _fresh(root: Path, temporary: Path) -> None:
    """An empty folder to write into; what crashed runs left behind goes."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".step_*"):
        shutil.rmtree(leftover)
    temporary.mkdir()


def _complete(temporary: Path, final: Path, step: int, world: int, progress: dict[str, Any], keep: int) -> None:
    """Seals a written state, gives it its name, and lets older ones go."""
    lists = {}
    for rank in range(world):
        path = temporary / list_name(rank)
        if not path.is_file():
            raise UserError(f"rank {rank} wrote to another disk: give all nodes the same shared --out")
        lists[path.name] = _sha256(path.read_bytes())
    content = {"format": FORMAT, "step": step, "world": world, "progress": progress, "lists": lists}
    atomic_write_json(temporary / MANIFEST, {**content, "sha256": _sha256(_canonical(content))})
    fsync(temporary)
    if final.exists():  # the same step again, after resuming from an earlier state
        aside = final.with_name(f".{final.name}.old")
        final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside)
    else:
        temporary.rename(final)
    fsync(final.parent)
    for old in _complete_states(final.parent)[:-keep]:
        aside = old.with_name(f".{old.name}.old")
        old.rename(aside)  # never half a folder under a good name
        shutil.rmtree(aside)


def _complete_states(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob(f"step_*/{MANIFEST}"))


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, average: Average) -> dict[str, torch.Tensor]:
    tensors = _weights(model)
    tensors |= {f"average.{name}": value for name, value in average.tensors.items()}
    names: dict[torch.Tensor, str] = {value: name for name, value in model.named_parameters()}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            tensors[f"optimizer.{key}.{names[parameter]}"] = value
    return tensors


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, tied ones once, and those buffers that a checkpoint would have too."""
    stored = model.state_dict(keep_vars=True)
    buffers = {name: value for name, value in model.named_buffers() if name in stored}
    return {f"weight.{name}": value for name, value in {**dict(model.named_parameters()), **buffers}.items()}


def _restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    progress: Mapping[str, Any],
) -> int:
    manifest = _manifest(folder)
    differing = _differences(manifest["progress"], json.loads(json.dumps(progress)))
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise UserError(f"{folder}: belongs to another run ({shown}): use another --out, or the old values")
    pieces = _pieces(folder, manifest)
    shapes = {piece.name: piece.shape for piece in pieces}
    targets = _weights(model) | {f"average.{name}": value for name, value in average.tensors.items()}
    stored = {name for name in shapes if not name.startswith("optimizer.")}
    for name in sorted(stored ^ set(targets)):
        where = "the state" if name in stored else "this model"
        raise UserError(f"{folder}: belongs to another model ({name} is only in {where}): use another --out")
    states = _empty_moments(model, optimizer, shapes, folder)
    for parameter, moments in states.items():
        optimizer.state[parameter] = moments
    names = {value: name for name, value in model.named_parameters()}
    for parameter, moments in states.items():
        targets |= {f"optimizer.{key}.{names[parameter]}": value for key, value in moments.items()}
    for name, target in targets.items():
        if tuple(target.shape) != shapes[name]:
            raise UserError(
                f"{folder}: belongs to another model ({name} is {shapes[name]}, this model's is "
                f"{tuple(target.shape)}): use another --out"
            )
    try:
        read_pieces(folder, pieces, targets)
    except UserError as error:
        raise UserError(f"{error}; {_advice(folder)}") from error
    return int(manifest["step"])


def _empty_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
    """Room for what the optimizer had: tensors like their parameter, and counters."""
    parameters = dict(model.named_parameters())
    on_device = {
        parameter: bool(group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    states: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for stored in shapes:
        kind, _, rest = stored.partition(".")
        if kind != "optimizer":
            continue
        key, _, name = rest.partition(".")
        parameter = parameters.get(name)
        if parameter is None or parameter not in on_device:
            raise UserError(f"{folder}: belongs to another model ({name} is not trained now): use another --out")
        if shapes[stored] == () != tuple(parameter.shape):
            value = torch.zeros((), device=parameter.device if on_device[parameter] else None)
        else:
            value = torch.zeros_like(parameter.detach())
        states.setdefault(parameter, {})[key] = value
    return states


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path}: format is {manifest['format']!r}, this version reads {FORMAT!r}: use another --out"
            )
        content = {key: value for key, value in manifest.items() if key != "sha256"}
        if _sha256(_canonical(content)) != manifest["sha256"]:
            raise ValueError("it does not match its checksum")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); {_advice(folder)}") from error
    return dict(manifest)


def _pieces(folder: Path, manifest: Mapping[str, Any]) -> list[Piece]:
    pieces: list[Piece] = []
    for name, digest in manifest["lists"].items():
        path = folder / name
        try:
            text = path.read_bytes()
            if _sha256(text) != digest:
                raise ValueError("it does not match its checksum")
            pieces += parse_pieces(text)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); {_advice(folder)}") from error
    return pieces


def _advice(folder: Path) -> str:
    """What to do about a damaged state."""
    others = [path for path in _complete_states(folder.parent) if path != folder]
    instead = f"to resume from {others[-1].name}" if others else "to start again"
    return f"delete {folder} {instead}"


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Dotted keys that differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        return [
            found
            for key in keys
            for found in _differences(
                before.get(key, _ABSENT), now.get(key, _ABSENT), f"{where}.{key}" if where else key
            )
        ]
    return [] if before == now else [f"{where}: {_short(before)} then, {_short(now)} now"]


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
