"""A headless Chromium, for the page's test, its pictures and its benchmark; needs the extra ``dev`` and Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen_vla_core.errors import UserError

PHONE = (390, 844)


@contextmanager
def chromium(width: int = 1440, height: int = 900) -> Iterator[Any]:
    """A selenium driver; the browser ends with the context. Nothing is ever downloaded.

    Raises:
        UserError: selenium, Chromium or its driver is not installed.
    """
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError as error:
        raise UserError("selenium is not installed: pip install 'qwen_vla_ros[dev]'") from error
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise UserError("Chromium and its driver are not installed: apt-get install chromium chromium-driver")
    os.environ["SE_OFFLINE"] = "true"  # selenium looks for drivers on the net otherwise
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    flags = ["--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars", "--mute-audio"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
    for flag in (*flags, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield window
    finally:
        window.quit()


def become_phone(window: Any) -> None:
    """The window is a phone's from now on: its size, its resolution, touch."""
    width, height = PHONE
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    window.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
