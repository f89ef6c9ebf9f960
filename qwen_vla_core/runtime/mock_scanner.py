"""The laser scanner of the kinematic mock: rays against boxes, in closed form."""

from __future__ import annotations

import math

import numpy as np

from qwen_vla_core.runtime.obstacles import Scan

BEAMS, RANGE_MIN_M, RANGE_MAX_M = 360, 0.02, 12.0
# Four walls, 10 m apart, around where the mock begins: x0, y0, x1, y1 of each.
DEFAULT_ROOM = (5.0, -5.1, 5.1, 5.1, -5.1, -5.1, -5.0, 5.1, -5.1, 5.0, 5.1, 5.1, -5.1, -5.1, 5.1, -5.0)


def scan_of_boxes(
    boxes_n4: np.ndarray, base: tuple[float, float, float], mount: tuple[float, float, float], stamp_ns: int
) -> Scan:
    """What a scanner all around measures.

    Args:
        boxes_n4: (n, 4) x0, y0, x1, y1 of obstacles with sides along the axes, metres.
        base: x, y, heading of the base in the same frame.
        mount: x, y, yaw of the scanner in the base's frame.
        stamp_ns: of the scan.
    """
    x, y, heading = base
    cos, sin = math.cos(heading), math.sin(heading)
    eye = np.array([x + cos * mount[0] - sin * mount[1], y + sin * mount[0] + cos * mount[1]])
    step = 2.0 * math.pi / BEAMS
    angles = heading + mount[2] - math.pi + step * np.arange(BEAMS)
    ways = np.column_stack([np.cos(angles), np.sin(angles)])
    ways = np.where(np.abs(ways) < 1e-12, 1e-12, ways)
    boxes = np.asarray(boxes_n4, dtype=np.float64).reshape(-1, 4)
    # Slabs: the part of each ray between the sides of a box, in x and in y; where both overlap it is hit.
    first = (boxes[None, :, :2] - eye) / ways[:, None, :]
    second = (boxes[None, :, 2:] - eye) / ways[:, None, :]
    enters = np.minimum(first, second).max(axis=2)
    leaves = np.maximum(first, second).min(axis=2)
    away = np.where((leaves >= enters) & (leaves > 0.0), np.maximum(enters, 0.0), np.inf)
    ranges = away.min(axis=1, initial=np.inf)
    ranges = np.where(ranges > RANGE_MAX_M, np.inf, ranges)
    ranges = np.where(ranges < RANGE_MIN_M, -np.inf, ranges)  # REP 117: too close to measure
    return Scan(-math.pi, step, RANGE_MIN_M, RANGE_MAX_M, ranges, stamp_ns)
