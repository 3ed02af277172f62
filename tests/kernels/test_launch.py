"""Launches of the Triton kernels: configuration, layouts, index arithmetic, errors, workspace."""

from typing import Any

import noise_cases
import op_cases as cases
import pytest
import torch
from op_backends import BACKENDS, GPU, call
from op_cases import ROWS
from torch import Tensor

from sbm_fast import kernels, noise
from sbm_fast.ops import affine_step
from sbm_fast.ops import langevin_epsilon as reference
from sbm_fast.ops._library import triton_missing

if triton_missing():
    pytest.skip(triton_missing(), allow_module_level=True)

import triton
import triton.language as tl
from sbm_fast.kernels import _launch, _philox, _row, langevin_epsilon

pytestmark = [pytest.mark.gpu] if GPU else []
DEVICE = BACKENDS["triton"].device
NAN = float("nan")


@pytest.mark.parametrize(
    ("numel", "block", "warps"),
    [(1, 128, 1), (128, 128, 1), (129, 256, 1), (257, 512, 2), (784, 1024, 4), (10**9, 1024, 4)],
)
def test_one_rule_by_the_size_of_a_sample(numel: int, block: int, warps: int) -> None:
    assert _launch.configuration(numel) == {"BLOCK": block, "num_warps": warps}


def test_a_sample_on_chip_is_one_block() -> None:
    for numel, block in ((3072, 4096), (4096, 4096), (1025, 2048), (2, 128)):
        assert _launch.configuration(numel, _launch.ON_CHIP)["BLOCK"] == block


@pytest.mark.parametrize(
    ("tensor", "sizes", "strides"),
    [
        (torch.zeros(4, 3, 8, 8), (1,), None),
        (torch.zeros(4, 1, 1, 5), (1,), None),
        (torch.zeros(1, 3, 8, 8)[:, :, None], (1,), None),
        (torch.zeros(4, 8, 8, 3).permute(0, 3, 1, 2), (64,), (192, 1, 3)),
        (torch.zeros(4, 3, 8, 16)[..., ::2], (1,), (384, 2)),
        (torch.zeros(4, 3, 8, 16)[..., :8], (8,), (384, 16, 1)),
        (torch.zeros(8, 3, 8, 8)[::2], (1,), (384, 1)),
        (torch.zeros(8)[::2], (1,), (2,)),
        (torch.zeros(5, 4, 3).permute(1, 2, 0), (5,), (3, 1, 12)),
    ],
)
def test_dimensions_are_merged(
    tensor: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...] | None
) -> None:
    dense = torch.zeros(tensor.shape)
    found = _launch.views(tensor.shape, x=dense, f=tensor, u=None)
    assert found == (sizes, {"x": (dense, None), "f": (tensor, strides), "u": (None, None)})


def test_layouts_are_cut_where_any_of_them_needs_it() -> None:
    last = torch.zeros(4, 8, 6, 3).permute(0, 3, 1, 2)
    padded = torch.zeros(4, 3, 8, 7)[..., :6]
    sizes, found = _launch.views(last.shape, a=last, b=padded)
    assert sizes == (8, 6)
    assert found == {"a": (last, (144, 1, 18, 3)), "b": (padded, (168, 56, 7, 1))}


def test_too_many_dimensions_are_named() -> None:
    """Eight are fine; a ninth is an error, whatever op."""
    for dims in (8, 9):
        out = torch.empty(1, *[4] * dims)[(slice(None), *[slice(None, 2)] * dims)]
        if dims == 8:
            call("triton", "uniform_", out, noise.keys(0, 1), 0, 1)
            assert torch.equal(out, noise.uniform(0, out.shape))
        else:
            with pytest.raises(RuntimeError, match=r"^out: too many dimensions: 9 after merging"):
                call("triton", "uniform_", out, noise.keys(0, 1), 0, 1)


@triton.jit(do_not_specialize=["program", "numel", "tiles"])
def offsets(out, program, numel, sizes, strides, tiles, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201
    """Offsets, from the tensor's first byte, of a tile of bytes; −1 for lanes that do not exist."""
    at = _row.tile_of(program.to(tl.int64), numel, sizes, tiles, WIDE, BLOCK)
    base = out.to(tl.pointer_type(tl.int8), bitcast=True)
    offset = _row.pointers((base, strides), at).to(tl.int64) - base.to(tl.int64)
    tl.store(out + tl.arange(0, BLOCK), tl.where(at[3], offset, -1))


@pytest.mark.parametrize(
    ("batch", "shape", "strides"),
    [
        (3, (2**20, 2**12 + 3), None),  # 2^32 elements a sample
        (2**24, (3, 32, 32), None),  # 5e10 elements in all
        (2**24, (3, 32, 32), (3072, 1, 3)),
        (5, (2**13, 2**18 + 1), (2**33 + 2**20, 2**20, 4)),
        (4, (2**31 - 5000,), (2**31, 1)),
        (4, (2**31 - 1,), (2**31, 1)),
    ],
)
def test_offsets_beyond_two_to_the_31(
    batch: int, shape: tuple[int, ...], strides: tuple[int, ...] | None
) -> None:
    """The last tile of the last sample, by Python's integers; nothing so large is allocated."""
    numel = torch.Size(shape).numel()
    block = _launch.configuration(numel)["BLOCK"]
    tiles = triton.cdiv(numel, block)
    sizes: tuple[int, ...] = (1,)
    if strides is not None and len(strides) > 2:
        sizes = (numel // shape[0],)
    out = torch.zeros(block, dtype=torch.int64, device=DEVICE)
    program = batch * tiles - 1
    offsets[(1,)](
        out, program, numel, sizes, strides, tiles, WIDE=_launch.is_wide(numel), BLOCK=block
    )
    start, last = (tiles - 1) * block, (batch - 1) * numel

    def expected(i: int) -> int:
        if i >= numel:
            return -1
        if strides is None:
            return last + i
        index = divmod(i, sizes[0]) if len(strides) > 2 else (i,)
        steps = zip(index, strides[1:], strict=True)
        return (batch - 1) * strides[0] + sum(k * step for k, step in steps)

    assert out.tolist() == [expected(start + k) for k in range(block)]


@triton.jit
def words_at(out, keys, start, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201
    w = _philox.sample_words(tl.load(keys), tl.load(start), tl.load(keys), tl.load(start), BLOCK)
    tl.store(out + tl.arange(0, BLOCK), _philox.in_order(w[0], w[1], w[2], w[3]).to(tl.int64))


@pytest.mark.parametrize("start", [0, 2**34 - 128, 2**34, 2**40 + 128])
def test_words_of_elements_beyond_two_to_the_34(start: int) -> None:
    key = 0x0123456789ABCDEF
    out = torch.zeros(128, dtype=torch.int64, device=DEVICE)
    given = (torch.tensor([v], device=DEVICE) for v in (key, start))
    words_at[(1,)](out, *given, BLOCK=128)
    expected: list[int] = []
    for j in range(start // 4, start // 4 + 32):
        counter = (j & noise_cases.M32, j >> 32, key & noise_cases.M32, start & noise_cases.M32)
        expected += noise_cases.philox(counter, (key & noise_cases.M32, key >> 32))
    assert out.tolist() == expected


def step(case: cases.Case, **change: Any) -> dict[str, Any]:
    """One step by the Triton kernel with the arguments that `change` replaces."""
    batch, dtype = len(case.x), case.x.dtype
    given: dict[str, Any] = {
        "x": case.x.clone(), "network": case.network, "uncond": case.uncond,
        "guidance": case.guidance, "registers": case.registers.clone(), "keys": case.keys,
        "row": case.row, "coef": case.coef, "field": case.field,
        "epsilon": torch.full((batch,), NAN, dtype=dtype), "noise": case.noise,
        "net_input": None, "net_time": None, "first_bad": case.first_bad.clone(),
    }  # fmt: skip
    given |= change
    call("triton", "affine_step_", **given)
    return given


def norm_case(shape: tuple[int, ...], *names: str) -> cases.Case:
    return cases.make(shape, [ROWS.index(names[b % len(names)]) for b in range(shape[0])])


@pytest.mark.parametrize("shape", [(3, 9), (3, 3, 19, 20), (3, 4097)])
@pytest.mark.parametrize("names", [("per_sample", "sqrt_d"), ("per_sample", "plain", "start")])
def test_uncoupled_rows_take_the_same_step(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    """In one launch where a sample fits a program, else in three."""
    case = norm_case(shape, *names)
    together, alone = step(case), step(case, coupled=False)
    for name in ("x", "registers", "epsilon"):
        assert torch.equal(together[name], alone[name]), name


@pytest.mark.parametrize("shape", [(3, 9), (3, 4097)])
def test_a_broken_promise_shows_as_nan(shape: tuple[int, ...]) -> None:
    """The host cannot look at the rows of a GPU."""
    case = norm_case(shape, "batch_mean", "per_sample", "plain")
    out = step(case, coupled=False)
    assert out["epsilon"][0].isnan() and out["x"][0].isnan().all()
    assert out["x"][1:].isfinite().all() and out["epsilon"][1:].isfinite().all()
    out = step(case, epsilon=None)
    assert out["x"][:2].isnan().all() and out["x"][2].isfinite().all()
    out = step(norm_case(shape, "plain", "start", "scale"), network=None)
    assert out["x"][0].isnan().all() and out["x"][1:].isfinite().all()


@pytest.mark.parametrize("shape", [(5, 9), (3, 4097)])
def test_a_workspace_serves_every_call(shape: tuple[int, ...]) -> None:
    """Its ticket is back at 0 after each; what else it holds is written before it is read."""
    case = norm_case(shape, "batch_mean", "per_sample", "batch_mean", "plain")
    workspace = affine_step.workspace_for(case.x)
    first = step(case)["x"]
    for _ in range(2):
        assert torch.equal(step(case, workspace=workspace)["x"], first)
        assert float(workspace[0]) == 0
        workspace[4:] = NAN


def test_a_workspace_of_another_state_is_refused() -> None:
    case = norm_case((3, 40), "per_sample")
    good = affine_step.workspace_for(case.x)
    for workspace in (good[:-1], good.double(), torch.zeros(2 * len(good))[::2]):
        with pytest.raises(RuntimeError, match=r"^workspace: expected at least 16 contiguous"):
            step(case, workspace=workspace)


@triton.jit(do_not_specialize=["numel", "batch", "rows", "row_stride"])
def last_program(  # noqa: ANN201
    epsilon, kept, row, coef, field, numel, batch, rows, row_stride,  # noqa: ANN001
    LANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    langevin_epsilon.batch_epsilon(
        epsilon, kept, row, coef, field, numel, batch, rows, row_stride, LANES, SCALE, tl.float32
    )


@pytest.mark.parametrize("batch", [1, 255, 257, 700])
def test_means_over_many_samples(batch: int) -> None:
    """Every third sample elsewhere; chunks of 256 norms, whose sums go through memory again."""
    coef, field = cases.pack(cases.table()[0], torch.float32), cases.table()[1]
    row = torch.full((batch,), ROWS.index("batch_mean"), dtype=torch.int32)
    row[1::3] = ROWS.index("per_sample")
    row[5::9] = -1
    together = row == ROWS.index("batch_mean")
    norms = torch.rand(batch, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    score, z = (reference.tree_mean(norms[together, k]) for k in (0, 1))
    lanes = coef.shape[2]
    scale = coef[ROWS.index("batch_mean"), 0, lanes - 3]
    expected = torch.where(together, scale * (z / score) * (z / score), 7.0)
    epsilon = torch.full((batch,), 7.0, device=DEVICE)
    given = (t.to(DEVICE) for t in (norms, row, coef, field))
    last_program[(1,)](
        epsilon, *given, 50, batch, len(coef), 1, LANES=lanes, SCALE=lanes - 3, **_launch.ARITHMETIC
    )
    assert torch.equal(epsilon.cpu(), expected)


def test_the_kernels_are_found_by_the_ops_names() -> None:
    for name in kernels.OPS:
        assert callable(getattr(kernels, name))
    with pytest.raises(AttributeError, match="no attribute 'affine_step'"):
        kernels.__getattr__("affine_step")


@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("names", [("plain",), ("batch_mean", "per_sample")])
def test_a_graph_replays_the_step(names: tuple[str, ...]) -> None:
    """Captured without a synchronisation, replayed with other rows, keys and states."""
    case = norm_case((64, 3, 32, 32), *names)
    other = norm_case((64, 3, 32, 32), *reversed(names))
    given = {
        name: value.cuda() if isinstance(value, Tensor) else value
        for name, value in step(case, workspace=affine_step.workspace_for(case.x)).items()
    }
    kernels.affine_step_(**given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernels.affine_step_(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for now in (other, case):
        for name in ("x", "network", "keys", "row", "registers"):
            given[name].copy_(getattr(now, name))
        graph.replay()
        assert torch.equal(given["x"].cpu(), step(now)["x"])
