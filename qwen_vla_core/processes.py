"""What every spawned worker process does first."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def begin_worker() -> None:
    """Leaves Ctrl-C to the parent, takes one thread (there is a worker per core), and ends when the parent does.

    The last is not to be had otherwise: a worker of ``ProcessPoolExecutor`` holds both ends of the pipe its work comes
    through, so after a parent that was killed it would wait, with all its memory, for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in THREADS:
        os.environ.setdefault(name, "1")
    with contextlib.suppress(ImportError):
        importlib.import_module("cv2").setNumThreads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), name="parent watch", daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
