"""Makes the emulator, the cases and the benchmarks importable."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "cuda_emulation")]
sys.path.append(str(ROOT))
