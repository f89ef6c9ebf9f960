"""The dashboard's tests share a server without ROS, and for the browser the graph support of the ROS tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "ros"))
