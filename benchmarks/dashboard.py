"""What the dashboard costs: CPU of its process with no, one and three browsers, and what they get.

    python benchmarks/dashboard.py [--seconds 10] [--camera-hz 30] [--json OUT.json]

A kinematic mock publishes three 640×480 cameras, joint states at 50 Hz and, through the real controller, commands. A
"browser" here is a websocket that takes what it is sent at once; a slow one takes a second for every picture. CPU is of
one core, from the kernel's accounting of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json
from qwen_vla_ros.bringup import build_graph, command_line, process_environment
from qwen_vla_ros.up import free_domain

SETTLE_S = 4.0
START_S = 60.0
SLOW_S = 1.0


class Browser:
    """One that counts; ``pause_s`` is how long it needs for a picture."""

    def __init__(self, address: str, pause_s: float = 0.0) -> None:
        self.states = self.pictures = self.bytes = 0
        self._pause_s = pause_s
        self._open = contextlib.ExitStack()
        self._socket = self._open.enter_context(connect(f"ws://{address}/api/socket", max_size=None, proxy=None))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                message = self._socket.recv()
                self.bytes += len(message)
                if isinstance(message, str):
                    self.states += 1
                    self._socket.send('{"taken": true}')
                else:
                    self.pictures += 1
                    time.sleep(self._pause_s)
                    self._socket.send(json.dumps({"drawn": message[0]}))

    def close(self) -> None:
        self._open.close()
        self._thread.join(timeout=5.0)


@contextlib.contextmanager
def graph(folder: Path, camera_hz: float) -> Iterator[tuple[str, dict[str, int]]]:
    """Mock, controller and dashboard; yields the dashboard's address and every node's process id."""
    params = folder / "params.yaml"
    params.write_text(f"mock_node:\n  ros__parameters:\n    camera_rate_hz: {camera_hz}\n")
    specs = build_graph(
        mock=True, policy=False, record=False, params_file=str(params), dashboard=True, dashboard_port=0
    )
    processes: dict[str, subprocess.Popen[str]] = {}
    log = folder / "dashboard.log"
    try:
        for spec in specs:
            with (folder / f"{spec.name}.log").open("w") as out, log.open("a") as page:
                stdout = page if spec.name == "dashboard_node" else out
                processes[spec.name] = subprocess.Popen(
                    command_line(spec),
                    env=process_environment(spec),
                    stdout=stdout,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
        found = wait(lambda: re.search(r"dashboard: http://(\S+)/", log.read_text()), "the dashboard's address")
        yield found[1], {name: process.pid for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait(timeout=20)


def wait(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + START_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise UserError(f"no {what} within {START_S:.0f} s")
        time.sleep(0.05)
    return value


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(address: str, pids: dict[str, int], seconds: float, quick: int, slow: int) -> dict[str, Any]:
    """CPU with so many browsers, and what each of them got per second."""
    browsers = [Browser(address) for _ in range(quick)] + [Browser(address, SLOW_S) for _ in range(slow)]
    time.sleep(SETTLE_S)
    started, before = time.monotonic(), {name: cpu_s(pid) for name, pid in pids.items()}
    counts = [(browser.states, browser.pictures, browser.bytes) for browser in browsers]
    time.sleep(seconds)
    elapsed = time.monotonic() - started
    cpu = {name: round(100 * (cpu_s(pid) - before[name]) / elapsed, 1) for name, pid in pids.items()}
    got = [
        {
            "states_hz": round((browser.states - states) / elapsed, 1),
            "pictures_hz": round((browser.pictures - pictures) / elapsed, 1),
            "kB_per_s": round((browser.bytes - size) / elapsed / 1e3),
        }
        for browser, (states, pictures, size) in zip(browsers, counts, strict=True)
    ]
    for browser in browsers:
        browser.close()
    return {"quick": quick, "slow": slow, "cpu_percent": cpu, "browsers": got}


def main() -> int:
    """Prints one line per number of browsers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="per number of browsers")
    parser.add_argument("--camera-hz", type=float, default=30.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = []
    try:
        with (
            free_domain(),
            tempfile.TemporaryDirectory() as folder,
            graph(Path(folder), args.camera_hz) as (site, pids),
        ):
            for quick, slow in ((0, 0), (1, 0), (3, 0), (1, 2)):
                row = measure(site, pids, args.seconds, quick, slow)
                rows.append(row)
                each = "; ".join(f"{b['pictures_hz']} pictures/s, {b['kB_per_s']} kB/s" for b in row["browsers"])
                cpu = ", ".join(f"{name.removesuffix('_node')} {value} %" for name, value in row["cpu_percent"].items())
                print(f"{quick} quick, {slow} slow: CPU {cpu}" + (f" ({each})" if each else ""), flush=True)
    except UserError as error:
        print(f"dashboard: {error}", file=sys.stderr)
        return 2
    if args.json:
        atomic_write_json(args.json, {"camera_hz": args.camera_hz, "seconds": args.seconds, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
