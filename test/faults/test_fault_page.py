"""docs/faults.md lists the matrix as it is."""

from __future__ import annotations

from pathlib import Path

import test_base_faults
import test_camera_faults
import test_chunk_faults
import test_clock_faults
import test_controller_process_faults
import test_driver_faults
import test_graph_faults
import test_recorder_faults
import test_server_faults
from fault_support import number

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
MODULES = (
    test_base_faults,
    test_camera_faults,
    test_chunk_faults,
    test_clock_faults,
    test_controller_process_faults,
    test_driver_faults,
    test_graph_faults,
    test_recorder_faults,
    test_server_faults,
)
FAULTS = [fault for module in MODULES for fault in module.FAULTS]


def test_every_fault_has_a_name_of_its_own_and_all_files_of_faults_are_here() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
    files = {path.stem for path in Path(__file__).parent.glob("test_*_faults.py")}
    assert files == {module.__name__ for module in MODULES}


def test_the_page_has_a_row_for_each_with_its_promise_and_bound() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip().replace("\\|", "|") for cell in row.strip("|").split(" | ")] for row in rows]
    listed = {row[0]: row[1:4] for row in cells}
    there = {fault.name: [fault.done, fault.promised, f"{number(fault.bound)} {fault.unit}"] for fault in FAULTS}
    assert listed == there, "make faults ARGS=--page"
