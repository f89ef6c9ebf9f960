"""Pictures on the wire: as they are, reduced exactly as the model would, or JPEG.

``reduce_area`` gives the same grey levels as the model's own area reduction (sums of whole numbers, halves to even), so
a picture reduced on the robot and one reduced on the server lead to the same chunk, bit for bit. JPEG does not.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from qwen_vla_core.serving.protocol import ProtocolError

MAX_SIDE = 4096
MODES = ("auto", "raw", "reduced", "jpeg")


def reduce_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height₀, width₀, 3) uint8 → (height, width, 3) uint8: means over cells, rounded to even.

    Cell i covers the pixels ⌊i·n/m⌋ … ⌈(i + 1)·n/m⌉ − 1 of n, as in torch's area interpolation.
    """
    if image.shape[:2] == (height, width):
        return image
    if image.shape[0] % height == 0 and image.shape[1] % width == 0:
        down, across = image.shape[0] // height, image.shape[1] // width
        # Column sums first, over long rows of bytes: several times faster than one sum over two axes.
        rows = image.reshape(height, down, -1)
        sums = rows[:, 0].astype(np.uint32)
        for index in range(1, down):
            sums += rows[:, index]
        cells = sums.reshape(height, width, across, 3)
        total = cells[:, :, 0].copy()
        for index in range(1, across):
            total += cells[:, :, index]
        return np.rint(total / (down * across)).astype(np.uint8)
    top, bottom = _cells(image.shape[0], height)
    left, right = _cells(image.shape[1], width)
    # Summed-area table with a border of zeros: any cell is four look-ups.
    table = np.zeros((image.shape[0] + 1, image.shape[1] + 1, 3), np.uint32)
    np.cumsum(np.cumsum(image, axis=0, dtype=np.uint32), axis=1, out=table[1:, 1:])
    total = table[bottom][:, right] - table[top][:, right] - table[bottom][:, left] + table[top][:, left]
    areas = np.outer(bottom - top, right - left)[:, :, None]
    return np.rint(total / areas).astype(np.uint8)


def _cells(size: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(parts)
    return index * size // parts, -(-(index + 1) * size // parts)


def encode_jpeg(image: np.ndarray, quality: int) -> dict[str, Any]:
    """RGB picture → the wire's entry."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, quality))
    if not done:
        raise ValueError(f"OpenCV cannot encode a picture of shape {image.shape}")
    return {"jpeg": data.tobytes()}


def decode_picture(value: Any, what: str) -> np.ndarray:
    """The wire's entry → (height, width, 3) uint8 RGB.

    Raises:
        ProtocolError: neither a picture nor a JPEG, or larger than ``MAX_SIDE``.
    """
    if isinstance(value, dict):
        data = value.get("jpeg")
        if not isinstance(data, bytes):
            raise ProtocolError(f"{what} is neither an array nor a JPEG")
        height, width = jpeg_size(data, what)
        _check_size(height, width, what)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise ProtocolError(f"{what} is not a readable JPEG")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if not isinstance(value, np.ndarray) or value.ndim != 3 or value.shape[2] != 3 or value.dtype != np.uint8:
        got = f"{value.shape} {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ProtocolError(f"{what} is {got}, not (height, width, 3) uint8")
    _check_size(value.shape[0], value.shape[1], what)
    return value


def _check_size(height: int, width: int, what: str) -> None:
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ProtocolError(f"{what} is {width}×{height} pixels, at most {MAX_SIDE}×{MAX_SIDE} are taken")


def jpeg_size(data: bytes, what: str) -> tuple[int, int]:
    """(height, width) from the header: a few bytes may claim gigabytes of pixels, so it is read before decoding."""
    position = 2
    if data[:2] != b"\xff\xd8":
        raise ProtocolError(f"{what} is not a JPEG")
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            break
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            height, width = data[position + 5 : position + 7], data[position + 7 : position + 9]
            return int.from_bytes(height, "big"), int.from_bytes(width, "big")
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    raise ProtocolError(f"{what} is a JPEG without a frame header")
