"""A checkpoint is one folder with everything needed to run; it refuses to load when a part is missing or foreign.

    config.json                 format, model configuration, hashes of the parts, provenance
    model.safetensors           weights (safetensors only); its metadata repeats the weights' id
    stats.json                  embodiment name → quantiles of actions and state
    embodiments/<name>.yaml     the robots, as they were in training
    tokenizer.json, tokenizer_config.json, chat_template.jinja, preprocessor_config.json

Saving writes a temporary neighbour, fsyncs it and renames it, so that a crash never leaves half a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json, atomic_write_text, fsync
from qwen_vla_core.model.backbone import Backbone
from qwen_vla_core.model.config import ModelConfig
from qwen_vla_core.model.policy import QwenVLA, Stats
from qwen_vla_core.model.processor import Processor
from qwen_vla_core.resources import resource_dir

FORMAT = "qwen_vla/1"
CONFIG, WEIGHTS, STATS, EMBODIMENTS = "config.json", "model.safetensors", "stats.json", "embodiments"
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
CONFIG_KEYS = {"format", "model", "weights_id", "stats_sha256", "embodiments", "processor_sha256", "provenance"}


def save_checkpoint(
    policy: QwenVLA,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes the folder atomically, replacing an existing checkpoint.

    Args:
        policy: with at least one embodiment, each with stats.
        folder: target; its parent is created.
        dtype: of the stored floating-point weights; None keeps the policy's.
        provenance: recipe, steps, seeds, commit … stored as given in config.json.
        weights: name → tensor, where they are elsewhere than in the policy (a sharded one, or their moving average).

    Raises:
        UserError: an embodiment has no stats, or the target exists and is no checkpoint.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise UserError(f"{target} exists and is not a checkpoint: choose another folder")
    if not policy.embodiments:
        raise UserError("a checkpoint needs at least one embodiment: policy.add_embodiment(...) first")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_parts(policy, temporary, dtype, provenance or {}, weights)
        temporary.chmod(0o755)
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        _swap(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def resolve_checkpoint(name_or_path: str | Path) -> Path:
    """Folder of a checkpoint: an existing folder, or the name of a shipped one.

    Raises:
        UserError: neither exists; the shipped names are listed.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    shipped = resource_dir("checkpoints")
    if len(path.parts) == 1 and (shipped / path.name).is_dir():
        return shipped / path.name
    names = ", ".join(sorted(folder.name for folder in shipped.iterdir() if folder.is_dir())) or "none"
    raise UserError(f"checkpoint {str(name_or_path)!r}: no such folder; shipped checkpoints: {names}")


def load_checkpoint(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> QwenVLA:
    """Reads a checkpoint; every part is checked before it is used.

    Args:
        folder: from ``save_checkpoint``.
        device: where the policy goes.
        dtype: of the computation; stored weights are converted.

    Returns:
        The policy in eval mode.

    Raises:
        UserError: a part is missing, unknown or does not belong to the rest; the message names it.
    """
    root = Path(folder)
    config = read_config(root)
    for name in (WEIGHTS, STATS, *PROCESSOR_FILES):
        if not (root / name).is_file():
            raise UserError(f"checkpoint {root}: {name} is missing")
    for name in PROCESSOR_FILES:
        if _sha256(root / name) != config["processor_sha256"].get(name):
            raise UserError(f"checkpoint {root}: {name} does not match processor_sha256 in {CONFIG}")
    if _sha256(root / STATS) != config["stats_sha256"]:
        raise UserError(f"checkpoint {root}: {STATS} does not match stats_sha256 in {CONFIG}")
    embodiments = _load_embodiments(root, config["embodiments"])
    stats = _load_stats(root, embodiments)
    model_config = ModelConfig.from_dict(config["model"])
    processor = Processor.from_pretrained(str(root))
    backbone = Backbone.from_config(model_config.backbone, initialise=False)
    with torch.random.fork_rng(devices=[]):
        policy = QwenVLA(model_config, backbone, processor, embodiments, stats)
    for parameter in policy.parameters():  # not policy.to: rotary frequencies are buffers and stay float32
        parameter.data = parameter.data.to(dtype)
    _load_weights(policy, root, config["weights_id"])
    return policy.to(device).eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint, checked for its format and keys."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"checkpoint {folder}: {CONFIG} is missing")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path}: format must be {FORMAT!r}; this is not a checkpoint this version can read")
    for key in sorted(set(config) - CONFIG_KEYS):
        raise UserError(f"{path}: unknown key {key!r}")
    for key in sorted(CONFIG_KEYS - set(config)):
        raise UserError(f"{path}: missing key {key!r}")
    return config


def trained_prefix(folder: str | Path) -> int:
    """How many first actions the last stage gave at most (``loss.prefix``); 0: none, or trained by something else."""
    recipe = read_config(folder)["provenance"].get("recipe")
    loss = recipe.get("loss") if isinstance(recipe, dict) else None
    return int(loss.get("prefix", 0)) if isinstance(loss, dict) else 0


def _write_parts(
    policy: QwenVLA,
    folder: Path,
    dtype: torch.dtype | None,
    provenance: Mapping[str, Any],
    whole: Mapping[str, torch.Tensor] | None,
) -> None:
    stats = {
        name: {"action": policy.embodiment_stats(name).action.to_dict(), "state": policy.stats[name].state.to_dict()}
        for name in policy.embodiments
    }
    atomic_write_json(folder / STATS, stats)
    for name, embodiment in policy.embodiments.items():
        atomic_write_text(folder / EMBODIMENTS / f"{name}.yaml", embodiment.source_text)
    policy.processor.save_pretrained(folder)
    weights = _weights(policy, dtype, whole)
    weights_id = _weights_id(weights)
    save_file(weights, str(folder / WEIGHTS), metadata={"format": "pt", "weights_id": weights_id})
    model = {**policy.config.to_dict(), "backbone": policy.backbone.config_dict()}
    atomic_write_json(
        folder / CONFIG,
        {
            "format": FORMAT,
            "model": model,
            "weights_id": weights_id,
            "stats_sha256": _sha256(folder / STATS),
            "embodiments": {name: embodiment.hash for name, embodiment in policy.embodiments.items()},
            "processor_sha256": {name: _sha256(folder / name) for name in PROCESSOR_FILES},
            "provenance": dict(provenance),
        },
    )


def _weights(
    policy: QwenVLA, dtype: torch.dtype | None, whole: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Every tensor once: a tied head is stored as the embedding it shares."""
    weights: dict[str, torch.Tensor] = {}
    stored = policy.state_dict(keep_vars=True)
    buffers = {name: value for name, value in policy.named_buffers() if name in stored}
    for name, value in {**dict(policy.named_parameters()), **buffers}.items():
        tensor = value if whole is None else whole.get(name, value)
        convert = dtype is not None and tensor.is_floating_point()
        weights[name] = tensor.detach().to("cpu", dtype if convert else tensor.dtype).contiguous()
    return weights


def _weights_id(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_embodiments(root: Path, expected: Mapping[str, str]) -> dict[str, Embodiment]:
    found = {}
    for name, digest in expected.items():
        path = root / EMBODIMENTS / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"checkpoint {root}: {EMBODIMENTS}/{name}.yaml is missing")
        embodiment = load_embodiment(path)
        if embodiment.hash != digest:
            raise UserError(f"checkpoint {root}: {EMBODIMENTS}/{name}.yaml does not match its hash in {CONFIG}")
        found[name] = embodiment
    return found


def _load_stats(root: Path, embodiments: Mapping[str, Embodiment]) -> dict[str, Stats]:
    data = json.loads((root / STATS).read_text())
    if set(data) != set(embodiments):
        raise UserError(f"checkpoint {root}: {STATS} has {sorted(data)}, {CONFIG} names {sorted(embodiments)}")
    return {
        name: Stats(Quantiles.from_dict(entry["action"]), Quantiles.from_dict(entry["state"]))
        for name, entry in data.items()
    }


def _load_weights(policy: QwenVLA, root: Path, weights_id: str) -> None:
    own = policy.state_dict()
    required = set(_unique_names(own))
    try:
        with safe_open(str(root / WEIGHTS), framework="pt") as file:
            if (file.metadata() or {}).get("weights_id") != weights_id:
                raise UserError(f"checkpoint {root}: {WEIGHTS} does not match weights_id in {CONFIG}")
            stored = set(file.keys())
            for name in sorted(required - stored):
                raise UserError(f"checkpoint {root}: {WEIGHTS} lacks the tensor {name}")
            for name in sorted(stored - set(own)):
                raise UserError(f"checkpoint {root}: {WEIGHTS} has an unknown tensor {name}")
            for name in stored:
                tensor = file.get_tensor(name)
                if tensor.shape != own[name].shape:
                    raise UserError(
                        f"checkpoint {root}: {WEIGHTS} tensor {name} is {tuple(tensor.shape)}, "
                        f"{CONFIG} asks for {tuple(own[name].shape)}"
                    )
                own[name].copy_(tensor)
    except SafetensorError as error:
        raise UserError(f"checkpoint {root}: {WEIGHTS} cannot be read: {error}") from error


def _unique_names(state: Mapping[str, torch.Tensor]) -> list[str]:
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(tensor.data_ptr(), name)
    return list(first.values())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _swap(temporary: Path, target: Path) -> None:
    """Renames ``temporary`` to ``target``; an older checkpoint steps aside first and is removed last."""
    if not target.exists():
        temporary.rename(target)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        target.rename(aside / target.name)
        try:
            temporary.rename(target)
        except OSError:
            (aside / target.name).rename(target)
            raise
        shutil.rmtree(aside)
    fsync(target.parent)
