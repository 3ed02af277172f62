"""Makes the cases and the benchmarks importable."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(ROOT))
