"""Fixtures of the check's tests."""

from __future__ import annotations

import sys
from pathlib import Path

# The models and requests of the builders' tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "builders"))
