#!/usr/bin/env python3
"""Runs the fault matrix and prints it: what goes wrong, what is promised, within which bound, what was measured.

python scripts/faults.py                   all of it, about four minutes
python scripts/faults.py -k camera         some of it; arguments are pytest's
python scripts/faults.py --page            all of it, and the table into docs/faults.md
python scripts/faults.py --json FILE       the rows as JSON
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "faults.md"
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "faults")]

from fault_support import REPORT_VARIABLE, table  # noqa: E402

from qwen_vla_core.files import atomic_write_text  # noqa: E402

BEGIN = """# Fault matrix

Each row is a fault that `make faults` provokes in real processes over real ROS 2 (`test/faults`), with what is promised
then, the largest value allowed and the value measured. Beside every fault that concerns the controller, all commands it
published are checked tick by tick: finite, inside the position limits, within the velocity and acceleration limits, no
step longer than two periods, not ahead of real time. The robot is the shipped ALOHA; every file of `test/faults`
is one running set of processes: `chunk`, `driver` and `clock` the controller alone, `camera` policy and controller,
`graph` everything with the simulator. What the controller guarantees and what not: [safety.md](safety.md).

Hold times count from the fault, or the last good message, to the stamp of the status that reports the hold: 500 ms of
watchdog and 300 ms of age limit are the robot's own settings, the rest of a bound is slack for a loaded machine.
Refusals are bound by the status, which comes twice a second.

"""


def page(rows: list[dict[str, Any]]) -> str:
    """docs/faults.md."""
    ok = sum(row["ok"] for row in rows)
    where = f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[1]:.0f} over the last five minutes"
    lines = [f"{ok} of {len(rows)} as promised, one run on a machine with {where} (`make faults ARGS=--page`).\n"]
    for number, cells in enumerate(table(rows)):
        done = "what is done" if number == 0 else rows[number - 1]["done"]
        cells = (cells[0], done, *cells[1:4])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if number == 0:
            lines.append("|---" * len(cells) + "|")
    return BEGIN + "\n".join(lines) + "\n"


def main() -> int:
    """Command line; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write docs/faults.md; only for the whole matrix")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    args, chosen = parser.parse_known_args()
    if args.page and chosen:
        parser.error(f"--page is for the whole matrix, without {chosen[0]}")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "faults.json"
        environment = {**os.environ, REPORT_VARIABLE: str(report)}
        command = [sys.executable, "-m", "pytest", "-q", "--disable-warnings", str(ROOT / "test" / "faults"), *chosen]
        if args.page:  # the test that compares it with the matrix would compare the old one
            command.append(f"--ignore={ROOT / 'test' / 'faults' / 'test_fault_page.py'}")
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        text = report.read_text() if report.is_file() else "[]\n"
    if args.json:
        atomic_write_text(args.json, text)
    if args.page:
        if code:
            print("faults: docs/faults.md is left as it is: not everything was as promised", file=sys.stderr)
        else:
            atomic_write_text(PAGE, page(json.loads(text)))
    return code


if __name__ == "__main__":
    sys.exit(main())
