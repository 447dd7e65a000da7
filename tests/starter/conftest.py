"""The programs in recipes/starter are scripts: tests import them from their folder."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "starter"))
