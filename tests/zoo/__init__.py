"""Drawn nets of real layers with drawn histories of tasks, held against the reference.

``python -m tests.zoo --examples 500`` prints how many were compared and what disagreed.
"""

from __future__ import annotations

import sys
from pathlib import Path

# ``python -m tests.zoo`` runs without pytest's path
sys.path[:0] = [str(Path(__file__).parents[1])]
