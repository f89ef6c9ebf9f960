"""What these tests share with those of data and training."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("data", "training"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
