"""Picture files: their size, whether they are whole, and their pixels. Every failure says which file and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from qwen_vla_core.data.boxes import Size


class PictureError(Exception):
    """A picture that is missing or damaged; the message names the file."""


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise PictureError(f"picture {path} is missing") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise PictureError(f"picture {path} is damaged ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return "no known format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())


def load_size(path: Path) -> Size:
    """(width, height) from the header. The stored orientation counts: boxes are annotated in it.

    Raises:
        PictureError: missing, or no picture.
    """
    with _open(path) as image:
        return image.size


def check_picture(path: Path) -> Size:
    """(width, height) of a picture that decodes to its end.

    JPEGs are decoded at an eighth of their size, which reads all their data in a fraction of the time.

    Raises:
        PictureError: missing, cut short or damaged.
    """
    with _open(path) as image:
        size = image.size
        try:
            image.draft("RGB", (max(1, size[0] // 8), max(1, size[1] // 8)))
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise PictureError(f"picture {path} is damaged ({_reason(error)})") from None
    return size


def load_picture(path: Path) -> np.ndarray:
    """(height, width, 3) uint8 RGB; grey, palette, transparent (on white) and 16-bit pictures too.

    Raises:
        PictureError: missing, cut short or damaged.
    """
    with _open(path) as image:
        try:
            if image.mode in ("I;16", "I;16B", "I;16L", "I"):
                return np.repeat((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                ground = Image.new("RGBA", image.size, "white")
                ground.alpha_composite(image.convert("RGBA"))
                return np.array(ground.convert("RGB"))
            return np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise PictureError(f"picture {path} is damaged ({_reason(error)})") from None
