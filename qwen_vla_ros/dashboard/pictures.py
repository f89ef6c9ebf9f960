"""Camera messages → JPEG of a size that a page needs. Only made for a picture that somebody waits for."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from qwen_vla_core.embodiment.spec import CameraSpec
from qwen_vla_ros.messages import compressed_to_rgb, image_to_rgb

QUALITY = 75
MAX_PASSED_ON = 60_000  # bytes: a JPEG that is small already is not encoded again


def jpeg(camera: CameraSpec, msg: Any, max_width: int) -> bytes:
    """The picture as JPEG, at most ``max_width`` wide.

    Raises:
        UserError, ValueError: the message holds no picture.
    """
    if camera.transport == "compressed" and len(msg.data) <= MAX_PASSED_ON and bytes(msg.data[:2]) == b"\xff\xd8":
        return bytes(msg.data)
    pixels = compressed_to_rgb(msg) if camera.transport == "compressed" else image_to_rgb(msg)
    return encode(pixels, max_width)


def encode(pixels: np.ndarray, max_width: int) -> bytes:
    """(height, width, 3) uint8 RGB → JPEG."""
    height, width = pixels.shape[:2]
    if width > max_width:
        size = (max_width, max(1, round(height * max_width / width)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    ok, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    if not ok:
        raise ValueError(f"cannot encode an array of shape {pixels.shape} as JPEG")
    return encoded.tobytes()
