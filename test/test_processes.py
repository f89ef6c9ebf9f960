"""Workers end with their parent, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Prints the numbers of its two workers, busy at first and then waiting for more, and waits to be killed.
POOL = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from qwen_vla_core.processes import begin_worker
if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=begin_worker)
    list(pool.map(time.sleep, [0.2, 0.2]))
    print(*pool._processes, flush=True)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Running, and not merely unburied: nobody may be there to take note of an orphan's end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    workers: list[int] = []
    try:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(alive, workers))
        parent.send_signal(how)
        parent.wait(10)
        end = time.monotonic() + 20
        while any(map(alive, workers)) and time.monotonic() < end:
            time.sleep(0.02)
        assert not any(map(alive, workers))
    finally:
        parent.kill()
        for pid in filter(alive, workers):
            os.kill(pid, signal.SIGKILL)


def test_a_worker_leaves_ctrl_c_to_its_parent_and_takes_one_thread() -> None:
    code = (
        "import os, signal; from qwen_vla_core.processes import begin_worker; begin_worker();"
        "os.kill(os.getpid(), signal.SIGINT); print(os.environ['OMP_NUM_THREADS'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
