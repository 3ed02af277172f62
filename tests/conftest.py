"""Makes the helper modules of these folders importable, whatever pytest's import mode."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "ops"), str(HERE / "statistics")]
