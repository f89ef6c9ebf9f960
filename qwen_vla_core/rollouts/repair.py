"""Making whole what a killed recorder left: the same messages in a bag with index and footer, in its final place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json, fsync
from qwen_vla_core.rollouts.bag import BagFile, types_of
from qwen_vla_core.rollouts.index import PARTIAL, SIDECAR, UNFINISHED, Rollout, read_about, read_rollout

KILLED = "the recorder ended without closing the bag"


def repair(rollout: Rollout) -> Rollout:
    """Copies every complete message into a new bag beside its siblings, then removes the broken one.

    Args:
        rollout: below ``.partial``.

    Returns:
        the episode in its final place; an unfinished one is now aborted, and can be labelled.

    Raises:
        UserError: it is whole, being recorded, holds no message, or the disk refuses.
    """
    if not rollout.partial:
        raise UserError(f"{rollout.name}: its bag was closed; there is nothing to repair")
    if rollout.recording:
        raise UserError(f"{rollout.name}: is being recorded; wait for its end")
    run_dir = rollout.folder.resolve().parent.parent
    final = run_dir / rollout.folder.name
    if final.exists():
        raise UserError(f"{final}: exists already; move one of the two away")
    try:
        about = read_about(rollout.folder)
    except UserError:
        about = {}
    new = run_dir / PARTIAL / "repair" / rollout.folder.name  # a bag's file has the name of its folder
    shutil.rmtree(new, ignore_errors=True)
    try:
        with BagFile(rollout.folder) as bag:
            if not bag.count:
                raise UserError(f"{rollout.name}: holds no complete message; remove {rollout.folder}")
            about = _told(about, bag)
            _copy(bag, new, about)
        atomic_write_json(new / SIDECAR, about)
        new.replace(final)
        fsync(run_dir)
        shutil.rmtree(rollout.folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"{rollout.name}: cannot be repaired ({error.strerror or error}); make room") from None
    for folder in (new.parent, run_dir / PARTIAL):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return read_rollout(final)


def _told(about: dict[str, Any], bag: BagFile) -> dict[str, Any]:
    """What ``episode.json`` says of the repaired bag."""
    judged = about.get("outcome", UNFINISHED) != UNFINISHED
    told = {} if judged else {"outcome": "aborted", "reason": KILLED, "judged_by": "repair"}
    size = sum(len(data) for _, _, data in bag.messages())
    seconds = round((bag.end_ns - bag.start_ns) * 1e-9, 3)
    return {**about, **told, "seconds": seconds, "messages": bag.count, "bytes": size, "repaired": True}


def _copy(bag: BagFile, folder: Path, about: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    store = get_typestore(Stores.EMPTY)
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {}
        for name, topic in bag.topics.items():
            types = types_of(bag.channel(name))
            store.register({key: value for key, value in types.items() if key not in store.fielddefs})
            connections[name] = writer.add_connection(name, topic.type, typestore=store)
        for name, time_ns, data in bag.messages():
            writer.write(connections[name], time_ns, data)
        for key, value in about.items():
            writer.set_custom_data(key, str(value))
    fsync(folder / f"{folder.name}.mcap")
