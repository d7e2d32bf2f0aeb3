"""The benchmarks are scripts beside the package: their folder is added to where modules are looked for."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
