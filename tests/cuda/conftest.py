"""Makes the emulator's loader and the benchmarks importable."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda_emulation"))
sys.path.append(str(ROOT))
