"""The published measures of goal-directed walks, from the facts of a ``Track``.

Definitions: NE, OSR, SR as in VLN-CE (a stop within a distance of the goal; ever within it), SPL of Anderson et al.
2018, nDTW of Ilharco et al. 2019. VLN-CE counts 3 m in whole flats; what counts here, the track says.
"""

from __future__ import annotations

import numpy as np

from qwen_vla_core.sim.planning import resample
from qwen_vla_core.sim.track import Track

SPACING = 0.15  # metres between the points of both paths that nDTW compares: waiting is no detour


def path_length(path_n2: np.ndarray) -> float:
    """Metres along a path of (n, 2) points; 0 for a single one."""
    return float(np.linalg.norm(np.diff(path_n2, axis=0), axis=1).sum())


def spl(success: bool, shortest: float, walked: float) -> float:
    """Success weighted by path length: S · l / max(p, l). 1 for a success without any way to go."""
    if not success:
        return 0.0
    return shortest / max(walked, shortest) if max(walked, shortest) > 0 else 1.0


def dtw(a_n2: np.ndarray, b_m2: np.ndarray) -> float:
    """Dynamic time warping cost of two paths: the least sum of distances over all monotone pairings."""
    gaps = np.linalg.norm(a_n2[:, None] - b_m2[None], axis=-1)
    row = np.concatenate([[0.0], np.full(gaps.shape[1], np.inf)])
    for line in gaps.tolist():
        new, left = [np.inf], np.inf
        for j, gap in enumerate(line):
            left = gap + min(row[j], row[j + 1], left)
            new.append(left)
        row = np.array(new)
    return float(row[-1])


def ndtw(path_n2: np.ndarray, reference_m2: np.ndarray, reach: float) -> float:
    """Normalised DTW: exp(−DTW(R, Q) / (|R| · d)), d the distance within which the goal counts as reached."""
    return float(np.exp(-dtw(reference_m2, path_n2) / (len(reference_m2) * reach)))


def measure(track: Track | None) -> dict[str, float]:
    """All measures of one walk; nothing where there was none.

    Returns:
        navigation_error_m: free way left to the goal where the walk ended; oracle_success: 1 when it was ever within
        reach (and had passed what was named by the end); spl; ndtw; path_m; bumps.
    """
    if track is None:
        return {}
    near = track.to_goal_n <= track.reach
    success = bool(track.stopped and track.passed and near[-1])
    walked = path_length(track.path_n2)
    return {
        "navigation_error_m": float(track.to_goal_n[-1]),
        "oracle_success": float(track.passed and bool(near.any())),
        "spl": spl(success, path_length(track.reference_m2), walked),
        "ndtw": ndtw(resample(track.path_n2, SPACING), resample(track.reference_m2, SPACING), track.reach),
        "path_m": walked,
        "bumps": float(track.bumps),
    }
