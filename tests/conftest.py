"""Makes the helper modules of these folders importable, whatever pytest's import mode, and lets
Triton's kernels run on the CPU where there is no GPU."""

import os
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
HELPERS = (".", "ops", "statistics", "cuda_emulation")
sys.path[:0] = [str(HERE / folder) for folder in HELPERS]

if "PYTEST_XDIST_WORKER" in os.environ:  # `pytest -n`: as many processes as cores
    torch.set_num_threads(1)

# Before anything imports Triton, which looks at it when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
