"""A launch through Triton's own binder and compiler, with a driver that launches nothing: what the
interpreter and the kernels compiled ahead of time pass by."""

import noise_cases
import pytest

from sbm_fast.ops._library import triton_missing

pytestmark = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())

LAUNCHES = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from sbm_fast import kernels

launched = []

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 128, 0, 1024

class Launcher:
    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, *arguments):
        launched.append(self.name)

class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
last = {"memory_format": torch.channels_last}
z, keys = torch.zeros(4, 3, 8, 8, dtype=torch.bfloat16), torch.arange(4)
for out in (z, z.contiguous(**last)):  # strides None, and a tuple
    kernels.normal_(out, keys, 1, 2)
x = torch.randn(2, 32, 4, 4, dtype=torch.bfloat16).contiguous(**last)
out, stats, row = torch.empty_like(x), torch.empty(2, 8, 2), torch.ones(2, 32)
for scale in (None, row):
    rows = None, None, scale, scale, scale
    kernels.group_norm_silu_(out, None, stats, x, *rows, None, 8, 1e-6, 1.0, True)
print(launched)
"""


def test_arguments_and_options_pass_the_binder() -> None:
    """Tuples with and without tensors, None, constants, `maxnreg`."""
    printed = noise_cases.run_python(LAUNCHES, TRITON_INTERPRET="0")
    assert printed.strip() == str(["fill", "fill", "hold", "hold"])
