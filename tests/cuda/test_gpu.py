"""The CUDA ops as torch uses them, on a GPU: streams, graphs, opcheck, torch.compile.

That the kernels' results are the CPU's is test_conformance.py, whose cases run on a GPU too.
"""

from collections.abc import Callable
from typing import Any

import op_cases as cases
import pytest
import torch
from conformance import differences
from op_cases import ROWS, Case
from torch import Tensor

from sbm_fast import _load, noise
from sbm_fast.ops import affine_step, langevin_epsilon
from sbm_fast.ops import noise as noise_ops


def compiled_for_cuda() -> bool:
    return _load.load() and torch._C._dispatch_has_kernel_for_dispatch_key(
        "sbm_fast::affine_step_", "CUDA"
    )


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not compiled_for_cuda(), reason="no compiled CUDA kernels"),
]
OPS = torch.ops.sbm_fast
STEP = (
    "x network uncond guidance registers keys row coef field epsilon noise net_input net_time "
    "first_bad workspace coupled"
).split()


def arguments(case: Case, device: str = "cuda") -> dict[str, Any]:
    """Copies of everything that a step takes, on the device."""
    given: dict[str, Any] = {name: getattr(case, name, None) for name in STEP}
    batch, dtype = len(case.x), case.x.dtype
    given |= {
        "epsilon": torch.zeros(batch, dtype=dtype),
        "net_input": torch.zeros_like(case.x, dtype=case.net_dtype),
        "net_time": torch.zeros(batch, dtype=dtype),
        "workspace": affine_step.workspace_for(case.x),
    }
    there = {n: t.clone().to(device) for n, t in given.items() if isinstance(t, Tensor)}
    return given | there | {"coupled": True}


def step(given: dict[str, Any]) -> None:
    affine_step.affine_step_(*(given[name] for name in STEP))


def stepped_on_the_cpu(case: Case) -> Tensor:
    given = arguments(case, "cpu")
    step(given)
    x: Tensor = given["x"]
    return x


def test_work_goes_to_the_current_stream() -> None:
    """Behind a long wait on a side stream nothing may have happened; then all of it has."""
    case = cases.make((16, 3, 32, 32), [ROWS.index("batch_mean")] * 16)
    given = arguments(case)
    z = torch.zeros_like(given["x"])
    step(arguments(case))  # a kernel's first launch loads its module, and may wait for the device
    OPS.normal_(torch.zeros_like(z), given["keys"], 1, 2)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        step(given)
        OPS.normal_(z, given["keys"], 1, 2)
    before = given["x"].clone()  # on the default stream, which does not wait
    torch.cuda.default_stream().synchronize()
    assert not side.query(), "the wait was too short to tell"
    assert torch.equal(before.cpu(), case.x)
    side.synchronize()
    assert differences(given["x"].cpu(), stepped_on_the_cpu(case)) == 0
    made = noise.normal(None, case.x.shape, keys=case.keys, draw=1, stream=2, backend="cpu")
    assert differences(z.cpu(), made) == 0


@pytest.mark.parametrize("name", ["plain", "history", "batch_mean", "per_sample"])
@pytest.mark.parametrize("workspace", [True, False])
def test_a_captured_step_replays_with_new_keys_rows_and_values(name: str, workspace: bool) -> None:
    first = cases.make((6, 3, 40, 40), [ROWS.index(name)] * 6, seed=1)
    given = arguments(first)
    if not workspace:
        given["workspace"] = None
    step(given)  # nothing is set up for the first time inside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(given)
    for seed, row in ((2, name), (3, "plain"), (4, name)):
        case = cases.make((6, 3, 40, 40), [ROWS.index(row)] * 6, seed=seed)
        for target in ("x", "network", "keys", "row", "registers"):
            given[target].copy_(getattr(case, target))
        graph.replay()
        torch.cuda.synchronize()
        assert differences(given["x"].cpu(), stepped_on_the_cpu(case)) == 0


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype, guided: bool) -> None:
    given = arguments(cases.make((10, 3, 4), dtype=dtype, guided=guided, explicit=guided))
    torch.library.opcheck(affine_step.affine_step_, tuple(given[name] for name in STEP))
    names = "epsilon x network uncond guidance keys row coef field noise".split()
    torch.library.opcheck(langevin_epsilon.langevin_epsilon_, tuple(given[n] for n in names))
    for kind in ("normal", "uniform", "rademacher"):
        torch.library.opcheck(noise_ops.OPS[kind], (given["x"], given["keys"], 1, 2))
    torch.library.opcheck(noise_ops.keys_, (given["keys"], 3, 1))


def test_compiles_as_a_full_graph() -> None:
    case = cases.make((10, 64), [ROWS.index("plain")] * 10)

    def run(given: dict[str, Any], x: Tensor, network: Tensor) -> Tensor:
        state = x + 1.0
        affine_step.affine_step_(
            *((given | {"x": state, "network": torch.tanh(network)})[n] for n in STEP)
        )
        return state * 2.0

    given = arguments(case)
    expected = run(arguments(case), given["x"], given["network"])
    compiled: Callable[..., Tensor] = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(
        compiled(given, given["x"], given["network"]), expected, rtol=2e-6, atol=2e-6
    )


def test_nothing_is_read_back() -> None:
    """Every host wait on the device is an error here."""
    given = arguments(cases.make((10, 3, 32, 32)))
    step(given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(given)
        OPS.langevin_epsilon_(
            *(given[n] for n in "epsilon x network uncond guidance keys row coef field".split()),
            None,
        )
        OPS.normal_(given["x"], given["keys"], 0, 1)
        OPS.keys_(given["keys"], 1, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_elements() -> None:
    """A sample whose last elements are the noise that its words say: 21.5 GB."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free device memory")
    numel = 2**31 + 4096
    case = cases.make((1, 4), [ROWS.index("plain")])
    x = torch.zeros(1, numel, device="cuda")
    network = torch.zeros(1, numel, device="cuda", dtype=torch.bfloat16)
    keys, row = case.keys.cuda(), case.row.cuda()
    keep = [*range(4), *range(cases.WIDTH, cases.WIDTH + 4)]
    keep += range(2 * cases.WIDTH, case.value.shape[1])
    coef = cases.pack(case.value[:, keep], torch.float32).cuda()
    affine_step.affine_step_(
        x, network, None, None, None, keys, row, coef, case.field.cuda(), None, None, None, None,
        None, None, True,
    )  # fmt: skip
    z = torch.empty_like(x)
    _, stream, draw, _ = case.field[1].tolist()
    OPS.normal_(z, keys, draw, stream)
    d = float(case.value[1, 3])
    torch.testing.assert_close(x[:, -4096:], d * z[:, -4096:], rtol=1e-6, atol=1e-7)


def test_errors_name_the_argument() -> None:
    given = arguments(cases.make((4, 6)))
    for name in ("network", "keys", "row", "coef", "workspace"):
        with pytest.raises(RuntimeError, match=f"{name}: "):
            step(given | {name: given[name].cpu()})
