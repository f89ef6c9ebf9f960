"""The fault matrix: one ledger for all of it, and benches that hear nobody else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2 (rclpy) is not installed")
sys.path.insert(0, str(Path(__file__).parent.parent / "ros"))

from fault_support import Ledger, table
from graph_support import checkpoint, ros_domain  # noqa: F401

LEDGER = pytest.StashKey[Ledger]()


@pytest.fixture(scope="session")
def ledger(request: pytest.FixtureRequest) -> Ledger:
    """What was measured in this session."""
    return request.config.stash.setdefault(LEDGER, Ledger())


@pytest.fixture(scope="module")
def make_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Starts a bench in a ROS domain of its own; closed after the module."""
    from domain_coordinator import domain_id
    from fault_bench import Bench

    benches: list[Bench] = []
    before = os.environ["ROS_DOMAIN_ID"]
    with domain_id() as domain:
        os.environ["ROS_DOMAIN_ID"] = str(domain)

        def make(specs: Any, kind: type[Bench] = Bench, **surroundings: bool) -> Bench:
            benches.append(kind(specs, tmp_path_factory.mktemp("bench"), **surroundings))
            return benches[-1]

        yield make
        for bench in benches:
            bench.close()
    os.environ["ROS_DOMAIN_ID"] = before


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the table, and writes it where asked."""
    ledger = config.stash.get(LEDGER, None)
    if ledger is None or not ledger.rows:
        return
    ledger.write()
    rows = table([vars(row) for row in ledger.rows])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    terminalreporter.section(f"{sum(row.ok for row in ledger.rows)} of {len(ledger.rows)} faults as promised")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        terminalreporter.write_line("  ".join(cells).rstrip())
