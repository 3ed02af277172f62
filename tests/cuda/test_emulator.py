"""The emulator finds what it is there to find: shown on kernels that are wrong on purpose."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import emulated
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs g++")

KERNELS = r"""
#include <cuda_runtime.h>
#include "launch.cuh"
namespace {
struct alignas(16) Four { float v[4]; };
enum { kFine, kNoBarrier, kLateBarrier, kDivergent, kDeadlock, kUnset, kOutside, kMisaligned,
       kOverflow, kDividedWarp, kEndedLane, kDynamic, kBlocks };

__global__ void sum(float* data, int flaw) {
  __shared__ float w[256];
  const unsigned t = threadIdx.x;
  float* const mine = data + blockIdx.x * 256;
  if (!(flaw == kUnset && t == 77)) w[t] = mine[t];
  for (unsigned half = 128; half >= 32; half /= 2) {
    if (flaw != kNoBarrier) __syncthreads();
    if (t < half) w[t] += w[t + half];
  }
  if (flaw != kLateBarrier) __syncthreads();
  float v = w[31 - t % 32];
  for (int d = 16; d > 0; d /= 2) v += __shfl_down_sync(~0u, v, d);
  if (t == 0) mine[0] = v;
  if (flaw == kDivergent && t < 32) __syncthreads();
  if (flaw == kDivergent && t >= 32) __syncthreads();
  if (flaw == kDeadlock && t < 8) __syncwarp();
  if (flaw == kOutside) w[t + 1 + blockIdx.x] = 0;
  if (flaw == kMisaligned) mine[1] = reinterpret_cast<const Four*>(mine + 2)->v[0];
  if (flaw == kOverflow) mine[1] = float(int(blockDim.x) * 0x1000000 * (int(t) + 1));
  if (flaw == kDividedWarp && t % 2) __syncwarp();
  if (flaw == kDividedWarp && t % 2 == 0) __syncwarp();
  if (flaw == kEndedLane && t != 5) __syncwarp();
}

// Every value that a thread brings along, by vote and by exchange.
__global__ void meetings(float* data) {
  SBM_DYNAMIC_SHARED(float, held);
  const unsigned t = threadIdx.x;
  held[t] = float(t);
  const int count = __syncthreads_count(t % 3 == 0);
  const unsigned half = __ballot_sync(~0u, t % 2);
  const float from = __shfl_sync(~0u, float(t), 3, 8), down = __shfl_down_sync(~0u, t, 2u, 16);
  const bool any = __syncthreads_or(t == 40), all = __syncthreads_and(t != 40);
  data[t] = held[63 - t] + 100 * from ;
  data[64 + t] = down;
  if (t == 0) data[128] = float(count), data[129] = float(half), data[130] = any, data[131] = all;
}

__global__ void last_block(float* data, unsigned* ticket) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    data[blockIdx.x] = float(blockIdx.x);
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) data[gridDim.x] = float(blockIdx.x), *ticket = 0;
}
}
extern "C" __attribute__((visibility("default"))) const char* toy(float* data, int flaw) {
  cudaError_t e;
  static unsigned ticket = 0;
  if (flaw == kDynamic)
    e = sbm::launch(meetings, dim3(1), dim3(64), 64 * sizeof(float), cudaStream_t(), data);
  else if (flaw == kBlocks)
    e = sbm::launch(last_block, dim3(9), dim3(32), 0, cudaStream_t(), data, &ticket);
  else
    e = sbm::launch(sum, dim3(2), dim3(256), 0, cudaStream_t(), data, flaw);
  return cudaGetErrorString(e);
}
"""
FLAWS = (
    "fine no_barrier late_barrier divergent deadlock unset outside misaligned overflow "
    "divided_warp ended_lane dynamic blocks"
).split()
Toy = Callable[..., tuple[str, Tensor]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder: Path = tmp_path_factory.mktemp("toy")
    (folder / "toy.cu").write_text(KERNELS)
    emulator = emulated.Emulator(emulated.build(folder, cache=folder / "built"))
    emulator.lib.toy.restype = ctypes.c_char_p
    emulator.lib.toy.argtypes = [ctypes.c_void_p, ctypes.c_int]

    def run(flaw: str, order: int = 0) -> tuple[str, Tensor]:
        data = torch.arange(2 * 256, dtype=torch.float32)
        with emulator.order(order):
            message = emulator.lib.toy(data.data_ptr(), FLAWS.index(flaw))
        return message.decode(), data

    return run


SUM = 255.0 * 128


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_right_kernel_runs_in_every_order(toy: Toy, order: int) -> None:
    message, data = toy("fine", order)
    assert message == "no error"
    assert data[0] == SUM and data[256] == SUM + 256 * 256


@pytest.mark.parametrize("flaw", ["no_barrier", "late_barrier"])
def test_a_missing_barrier_shows_in_some_order(toy: Toy, flaw: str) -> None:
    sums = [toy(flaw, order)[1][0].item() for order in range(4)]
    assert any(s != SUM for s in sums)


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("divergent", "divergent barrier: toy.cu:"),
        ("deadlock", "names a lane that has ended"),
        ("outside", "out_of_bounds at toy.cu:"),
        ("misaligned", "misaligned access at toy.cu:"),
        ("overflow", "mul_overflow at toy.cu:"),
        ("divided_warp", "divergent warp: toy.cu:"),
        ("ended_lane", "names a lane that has ended"),
    ],
)
def test_errors_end_the_launch_and_say_where(toy: Toy, flaw: str, message: str) -> None:
    for order in range(3):
        got = toy(flaw, order)[0]
        assert message in got or (flaw != "outside" and "deadlock" in got), got
    assert toy("fine")[0] == "no error"


def test_shared_memory_is_poisoned_for_every_block(toy: Toy) -> None:
    data = toy("unset")[1]
    assert data[0].isnan() and data[256].isnan()


def test_votes_exchanges_and_dynamic_shared_memory(toy: Toy) -> None:
    t = torch.arange(64)
    for order in range(3):
        message, data = toy("dynamic", order)
        assert message == "no error"
        expected = (63 - t) + 100 * (t // 8 * 8 + 3)
        assert data[:64].tolist() == expected.tolist()
        assert data[64:128].tolist() == torch.where(t % 16 < 14, t + 2, t).tolist()
        assert data[128:132].tolist() == [22.0, float(torch.tensor(0xAAAAAAAA).float()), 1.0, 0.0]


def test_the_last_block_depends_on_the_order(toy: Toy) -> None:
    last = {toy("blocks", order)[1][9].item() for order in range(6)}
    assert {8.0, 0.0} < last
