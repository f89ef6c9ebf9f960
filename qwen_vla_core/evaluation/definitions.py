"""What every number means and who defined it; the report page and docs/evaluation.md say the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One measure.

    Attributes:
        label: for tables, short.
        text: its definition.
        source: P the paper, X others, I inferred, O ours; with a name where there is one.
        places: decimals worth printing.
    """

    label: str
    text: str
    source: str
    places: int = 2


METRICS: dict[str, Metric] = {
    "success": Metric("SR", "share of episodes in which the task's condition held in time", "P"),
    "wrong_object": Metric(
        "wrong object", "share of episodes in which another object than the named one was acted on", "O"
    ),
    "mean_seconds_to_success": Metric(
        "time to success", "mean simulated seconds of the episodes that succeeded", "X", 1
    ),
    "progress": Metric(
        "progress",
        "share of the task's stages that were reached, 1 for a success (pick: touched, held, done; transfer: held, "
        "lifted, in both hands, done; place: held, lifted, over the plate, done; belt: touched, held, done; goto: at "
        "the goal, done; past and through: passed, at the goal, done)",
        "O",
    ),
    "navigation_error_m": Metric(
        "NE m",
        "length of the free way from where the walk ended to the landmark's centre; 0.7 is a perfect stop",
        "X: VLN-CE",
    ),
    "oracle_success": Metric(
        "OSR", "share of walks that were ever within reach (1 m) of the goal and had passed what was named", "X: VLN-CE"
    ),
    "spl": Metric(
        "SPL", "success times shortest way over the longer of walked and shortest way", "X: Anderson et al. 2018"
    ),
    "ndtw": Metric(
        "nDTW",
        "exp(−DTW / (points of the reference · reach)) of the walk and the shortest way, both sampled each 15 cm",
        "X: Ilharco et al. 2019",
    ),
    "path_m": Metric("way m", "length of the walk", "X: VLN-CE"),
    "bumps": Metric("bumps", "how often the base ran into something", "O"),
    "manipulation_score": Metric(
        "MS",
        "route completion times penalties: 0.5 where the target left the belt; 0 to 1 (DOMINO prints it times 100)",
        "X: DOMINO",
    ),
    "route_completion": Metric(
        "route completion",
        "1 for a success, else how much nearer the hand came to where the target was last, as a share of the start's "
        "distance",
        "X: DOMINO",
    ),
    "named_cube_lifted": Metric("lifted", "share of episodes in which the named cube was ever lifted", "O"),
    "named_cube_lost": Metric("lost", "share of episodes in which the named cube left the belt by itself", "O"),
    "jerk_mean": Metric(
        "jerk", "mean absolute third difference of the commands, arm joints in rad/s³ or positions in m/s³", "X", 1
    ),
    "jerk_max": Metric("largest jerk", "the largest of them", "X", 0),
    "jump_mean": Metric("jump", "mean distance of new and old plan where a chunk took over, rad or m", "O", 3),
    "jump_max": Metric("largest jump", "the largest of them", "O", 3),
    "idle": Metric("idle", "share of the time by which the plan stood still or was slowed down", "O"),
}


def shown(name: str, value: float) -> str:
    """A mean with the decimals worth printing."""
    places = METRICS[name].places if name in METRICS else 2
    return f"{value:.{places}f}"


def label(name: str) -> str:
    """Short name for a table."""
    return METRICS[name].label if name in METRICS else name.replace("_", " ")
