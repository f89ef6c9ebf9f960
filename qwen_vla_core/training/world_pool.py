"""Many worlds behind one interface: in this process, in spawned processes, or as Ray actors.

The parent sends every waiting world its order and gets all looks back; between these moments worlds of different
workers run at the same time. Results do not depend on the backend or on the number of workers.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

from qwen_vla_core.errors import UserError
from qwen_vla_core.processes import THREADS, begin_worker
from qwen_vla_core.training.world_host import Look, Order, WorldFactory, WorldHost, shares

Backend = Literal["processes", "ray"]


class WorldPool(Protocol):
    """Worlds by slot number."""

    def obey(self, orders: Mapping[int, Order]) -> dict[int, Look]:
        """Carries out one order per slot; slot → what is to be seen then, in the order of slots."""
        ...

    def close(self) -> None:
        """Ends all workers."""
        ...


@contextlib.contextmanager
def open_pool(factories: Sequence[WorldFactory], workers: int, backend: Backend = "processes") -> Iterator[WorldPool]:
    """A pool that is closed on leaving the block, whatever happens.

    Args:
        factories: one per slot.
        workers: processes or Ray actors; 0 keeps all worlds in this process.
        backend: where workers run.

    Raises:
        UserError: a world cannot be built, a worker died, or Ray is asked for and not installed.
    """
    pool: WorldPool
    if workers == 0:
        pool = _Here(factories)
    elif backend == "ray":
        pool = _RayActors(factories, workers)
    else:
        pool = _Processes(factories, workers)
    try:
        yield pool
    finally:
        pool.close()


class _Here:
    """All worlds in this process, one after another."""

    def __init__(self, factories: Sequence[WorldFactory]) -> None:
        self.host = WorldHost(dict(enumerate(factories)))

    def obey(self, orders: Mapping[int, Order]) -> dict[int, Look]:
        return self.host.obey(dict(sorted(orders.items())))

    def close(self) -> None:
        self.host.close()


class _Spread:
    """What pools of several workers have in common: who has which slot."""

    def __init__(self, slots: int, workers: int) -> None:
        self.slots = shares(slots, workers)
        self.owner = {slot: worker for worker, own in enumerate(self.slots) for slot in own}

    def divide(self, orders: Mapping[int, Order]) -> dict[int, dict[int, Order]]:
        """Worker → its orders."""
        parts: dict[int, dict[int, Order]] = {}
        for slot in sorted(orders):
            parts.setdefault(self.owner[slot], {})[slot] = orders[slot]
        return parts


class _Processes(_Spread):
    """Spawned processes (a forked GL context does not work), each behind two one-way pipes of its own."""

    def __init__(self, factories: Sequence[WorldFactory], workers: int) -> None:
        super().__init__(len(factories), workers)
        context = multiprocessing.get_context("spawn")
        self.processes: list[Any] = []
        self.to: list[Connection] = []
        self.back: list[Connection] = []
        with _one_thread_each():
            for own in self.slots:
                orders, to = context.Pipe(duplex=False)
                back, looks = context.Pipe(duplex=False)
                mine = {slot: factories[slot] for slot in own}
                process = context.Process(target=_serve, args=(mine, orders, looks), daemon=True)
                process.start()
                orders.close()
                looks.close()  # the child's ends: kept open here, a dead child would never be noticed
                self.processes.append(process)
                self.to.append(to)
                self.back.append(back)

    def obey(self, orders: Mapping[int, Order]) -> dict[int, Look]:
        parts = self.divide(orders)
        looks: dict[int, Look] = {}
        try:
            for worker, part in parts.items():
                self.to[worker].send(part)
            for worker in parts:
                looks |= _opened(self.back[worker].recv())
        except (EOFError, ConnectionError):
            raise UserError(
                f"workers {len(self.processes)}: a process with worlds died, most likely of memory; "
                "use fewer worlds or workers"
            ) from None
        return dict(sorted(looks.items()))

    def close(self) -> None:
        for connection in (*self.to, *self.back):
            connection.close()  # a worker leaves its loop when its pipe ends
        for process in self.processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(factories: Mapping[int, WorldFactory], orders: Connection, looks: Connection) -> None:
    """In a worker: obeys until the pipe ends."""
    begin_worker()
    host = WorldHost(factories)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            looks.send(_attempt(host, orders.recv()))
    host.close()


class _RayActors(_Spread):
    """One actor per worker, on this machine or on the cluster that ``RAY_ADDRESS`` names."""

    def __init__(self, factories: Sequence[WorldFactory], workers: int) -> None:
        super().__init__(len(factories), workers)
        self.ray, self.started = start_ray(workers, "workers_backend ray", "use workers_backend: processes")
        actor = self.ray.remote(num_cpus=1)(_Actor)
        self.actors = [actor.remote({slot: factories[slot] for slot in own}) for own in self.slots]

    def obey(self, orders: Mapping[int, Order]) -> dict[int, Look]:
        asked = [self.actors[worker].obey.remote(part) for worker, part in self.divide(orders).items()]
        looks: dict[int, Look] = {}
        try:
            for answer in self.ray.get(asked):
                looks |= _opened(answer)
        except self.ray.exceptions.RayActorError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"workers_backend ray: an actor with worlds died: {reason}") from None
        return dict(sorted(looks.items()))

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)
        if self.started:
            self.ray.shutdown()


def start_ray(workers: int, asked_by: str, instead: str) -> tuple[Any, bool]:
    """Ray, connected to ``RAY_ADDRESS`` or started here with ``workers`` CPUs, and whether it was not running yet.

    Args:
        workers: actors that are to run at once.
        asked_by: the key or flag that errors name.
        instead: what to do without Ray.

    Raises:
        UserError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise UserError(
            f"{asked_by}: Ray is not installed ({error}); pip install 'qwen_vla_ros[ray]', or {instead}"
        ) from None
    started = not ray.is_initialized()
    if started:
        # Actors find modules where this process does, render without a display, and use one thread each.
        environment = {
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
            "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl"),
            **dict.fromkeys(THREADS, "1"),
        }
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        options["runtime_env"] = {"env_vars": environment}
        if not os.environ.get("RAY_ADDRESS"):
            options |= {"num_cpus": workers, "include_dashboard": False}
        ray.init(**options)
    return ray, started


class _Actor:
    """A ``WorldHost`` as a Ray actor."""

    def __init__(self, factories: Mapping[int, WorldFactory]) -> None:
        self.host = WorldHost(factories)

    def obey(self, orders: Mapping[int, Order]) -> dict[int, Look] | tuple[str, bool]:
        return _attempt(self.host, orders)


def _attempt(host: WorldHost, orders: Mapping[int, Order]) -> dict[int, Look] | tuple[str, bool]:
    """Looks, or (text, whether the user can fix it): exceptions with their own arguments do not survive the way."""
    try:
        return host.obey(orders)
    except UserError as error:
        return str(error), True
    except Exception:
        return traceback.format_exc(), False


def _opened(answer: dict[int, Look] | tuple[str, bool]) -> dict[int, Look]:
    if isinstance(answer, dict):
        return answer
    text, fixable = answer
    raise UserError(text) if fixable else RuntimeError(f"in a process with worlds:\n{text}")


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Children read these when they load their libraries: two threads each on two cores are slower than one."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
