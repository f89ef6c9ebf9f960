"""The node of the operator's page; everything is in ``dashboard``."""

from __future__ import annotations

import sys

from qwen_vla_ros.dashboard.node import DashboardNode, main

__all__ = ["DashboardNode", "main"]

if __name__ == "__main__":
    sys.exit(main())
