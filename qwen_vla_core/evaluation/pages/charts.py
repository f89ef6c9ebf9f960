"""Plots as inline SVG: coordinates in per cent, so that they fill a phone or a desk, and colours from the page's theme.

Only numbers go into them.
"""

from __future__ import annotations

from collections.abc import Sequence

HEIGHT = 20
TICKS = (0, 25, 50, 75, 100)


def interval(low: float, value: float, high: float) -> str:
    """A rate with its interval on a rail from 0 to 100 %."""
    middle = HEIGHT / 2
    ticks = "".join(
        f'<line class="tick" x1="{at}%" x2="{at}%" y1="{middle - 3}" y2="{middle + 3}"/>' for at in TICKS[1:-1]
    )
    return (
        f'<svg class="chart" width="100%" height="{HEIGHT}" role="img" '
        f'aria-label="{value:.0%}, 95 % interval {low:.0%} to {high:.0%}">'
        f'<line class="rail" x1="0%" x2="100%" y1="{middle}" y2="{middle}"/>{ticks}'
        f'<line class="span" x1="{100 * low:.2f}%" x2="{100 * high:.2f}%" y1="{middle}" y2="{middle}"/>'
        f'<circle class="dot" cx="{100 * value:.2f}%" cy="{middle}" r="4.5"/></svg>'
    )


def stages(values: Sequence[float], successes: int) -> str:
    """How far episodes came: a bar whose parts are shares of all episodes.

    Args:
        values: progress of every episode, 0..1.
        successes: how many of them succeeded.
    """
    count = len(values)
    failed = sorted((value for value in values if value < 1), reverse=True)
    bins = (
        ("p4", successes),
        ("p3", sum(value >= 2 / 3 - 1e-9 for value in failed)),
        ("p2", sum(1 / 3 - 1e-9 <= value < 2 / 3 - 1e-9 for value in failed)),
        ("p1", sum(1e-9 < value < 1 / 3 - 1e-9 for value in failed)),
        ("p0", sum(value <= 1e-9 for value in failed)),
    )
    parts, at = [], 0.0
    for style, number in bins:
        width = 100 * number / count
        if number:
            parts.append(f'<rect class="{style}" x="{at:.2f}%" width="{width:.2f}%" y="3" height="{HEIGHT - 6}"/>')
        at += width
    said = ", ".join(f"{number}" for _, number in bins)
    return (
        f'<svg class="chart" width="100%" height="{HEIGHT}" role="img" '
        f'aria-label="done, most, half, little, nothing: {said} of {count}">{"".join(parts)}</svg>'
    )


def times(seconds: Sequence[float], limit: float) -> str:
    """Seconds to success, a mark per episode, on a rail from 0 to ``limit``."""
    middle = HEIGHT / 2
    marks = "".join(
        f'<circle class="mark" cx="{min(100.0, 100 * value / limit):.2f}%" cy="{middle}" r="3.2"/>' for value in seconds
    )
    return (
        f'<svg class="chart" width="100%" height="{HEIGHT}" role="img" aria-label="{len(seconds)} successes">'
        f'<line class="rail" x1="0%" x2="100%" y1="{middle}" y2="{middle}"/>{marks}</svg>'
    )
