"""Makes the emulator's loader importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))
