"""Draws docs/images/dashboard.png and dashboard_phone.png: the page beside a running simulated ALOHA.

    python scripts/dashboard_pictures.py            # needs Chromium (scripts/setup.sh --browser)

The graph runs in a ROS domain of its own and records into a folder that is thrown away.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_bytes
from qwen_vla_ros.dashboard.browser import PHONE, become_phone, chromium

ROOT = Path(__file__).resolve().parents[1]
DESK = (1440, 1640)  # everything down to the ages
EPISODES = 3  # seen in the list
START_S = 180.0
COLOURS = 256  # of the palette: enough for flat panels and small camera pictures


@contextlib.contextmanager
def running_robot(folder: Path, speed: float) -> Iterator[str]:
    """The graph with its dashboard; yields its address. Not at speed 1, all nodes follow the simulator's clock."""
    command = [sys.executable, "-m", "qwen_vla_core.cli", "up", "aloha", "--isolated", "--dashboard-port", "0"]
    if speed != 1.0:
        params = folder / "params.yaml"
        params.write_text(f"sim_node:\n  ros__parameters:\n    real_time_factor: {speed}\n")
        command += ["--use-sim-time", "--params-file", str(params)]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--rollouts", str(folder / "rollouts")], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield wait(lambda: re.search(r"dashboard: (\S+)", log.read_text()), "the dashboard's address")[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def wait(condition: Callable[[], Any], what: str) -> Any:
    """The condition's value, as soon as it has one.

    Raises:
        UserError: it did not come.
    """
    deadline = time.monotonic() + START_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise UserError(f"no {what} within {START_S:.0f} s")
        time.sleep(0.1)
    return value


def wait_for_motion(window: Any) -> None:
    """Until pictures, a playing plan and some recorded episodes are on the page, in the middle of an episode."""
    ready = (
        f"return document.querySelectorAll('#rollouts li').length > {EPISODES}"
        " && document.querySelectorAll('figure[data-state=ok]').length === 3"
        " && document.querySelector('#mode').textContent === 'running'"
        " && !document.querySelector('#plan-words').textContent.includes('empty')"
        " && / [2-9] of \\d+ actions consumed/.test(document.querySelector('#plan-words').textContent)"
    )
    try:
        wait(lambda: window.execute_script(ready), "motion on the page")
    except UserError as error:
        shown = window.find_element("css selector", "main").text
        raise UserError(f"{error}; shown:\n{shown}") from None


def shoot(window: Any, path: Path, size: tuple[int, int], colours: int = COLOURS) -> None:
    """Writes what the window shows as a PNG with a palette."""
    from PIL import Image

    clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
    taken = window.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "clip": clip})
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(taken["data"]), np.uint8), cv2.IMREAD_COLOR)
    image = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)).quantize(
        colours, dither=Image.Dither.FLOYDSTEINBERG
    )
    with tempfile.TemporaryFile() as file:
        image.save(file, "PNG", optimize=True)
        file.seek(0)
        atomic_write_bytes(path, file.read())
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def main() -> int:
    """Exit code 0, or 2 with a line that says what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", metavar="DIR")
    text = "simulated seconds per second; below 1 where the computer is too slow or too busy for real time"
    parser.add_argument("--speed", type=float, default=1.0, help=text)
    args = parser.parse_args()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            running_robot(Path(folder), args.speed) as address,
            chromium(*DESK) as window,
        ):
            window.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": DESK[0], "height": DESK[1], "deviceScaleFactor": 1, "mobile": False},
            )
            window.get(address)
            wait_for_motion(window)
            shoot(window, args.out / "dashboard.png", DESK)
            become_phone(window)
            dark = [{"name": "prefers-color-scheme", "value": "dark"}]
            window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
            window.get(address)
            wait_for_motion(window)
            shoot(window, args.out / "dashboard_phone.png", PHONE)
    except UserError as error:
        print(f"dashboard_pictures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
