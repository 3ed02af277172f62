"""CUDA graphs on a GPU: equal to the loop, reused, without growth, and harmless when they fail."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import capture_cases
import pytest
import sampling_cases as cases
import torch
from capture_cases import SHAPE, guided_model
from torch import Tensor, nn

from sbm_fast import VPSDE, Sampler, noise
from sbm_fast.backend import Kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:norm=:UserWarning", "ignore:the plan cancels"),
]
CUDA = "cuda"


def pair(name: str = "em", net: Any = cases.network, **more: Any) -> tuple[Sampler, Sampler]:
    """(loop, graph) on the GPU"""
    shape = more.pop("shape", SHAPE)
    loop = cases.sampler(name, shape, net, device=CUDA, **more)
    if loop.kernels.name == "eager":
        pytest.skip("neither CUDA nor Triton kernels here")
    return loop, cases.sampler(name, shape, net, device=CUDA, cuda_graph=True, **more)


@pytest.mark.parametrize("name", list(cases.METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_graph_is_the_loop(name: str, dtype: torch.dtype) -> None:
    loop, graph = pair(name, dtype=dtype)
    x_init = torch.linspace(-2, 2, 60).reshape(SHAPE)
    for seed in (0, 1):
        assert torch.equal(graph(seed=seed), loop(seed=seed))
    keys = noise.keys(5, 4).flip(0)
    assert torch.equal(graph(keys=keys), loop(keys=keys))
    assert torch.equal(graph(seed=2, x_init=x_init), loop(seed=2, x_init=x_init))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("norm", ["sigma", "per_sample", "sqrt_d", "batch_mean"])
@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (3, 1, 300, 500)])
def test_each_backend_at_sizes_on_and_off_the_chip(
    backend: str, norm: str, shape: tuple[int, ...]
) -> None:
    from sbm_fast.doctor import backends

    if reason := backends()[backend]:
        pytest.skip(reason)
    more: dict[str, Any] = {"backend": backend, "norm": norm, "steps": 4, "method": "pc"}
    loop, graph = (
        Sampler(cases.network, VPSDE(), shape, device=CUDA, cuda_graph=g, **more)
        for g in (False, True)
    )
    for seed in (0, 1):
        assert torch.equal(graph(seed=seed), loop(seed=seed))


@pytest.mark.parametrize("kind", ["learned variance", "dynamic threshold"])
def test_row_inputs(kind: str) -> None:
    pair()
    loop, graph = (
        capture_cases.row_input_sampler(kind, device=CUDA, cuda_graph=g) for g in (False, True)
    )
    for seed in (0, 1):
        assert torch.equal(graph(seed=seed), loop(seed=seed))


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.bfloat16])
def test_new_conditioning_and_guidance_enter_the_graph(net_dtype: torch.dtype) -> None:
    loop, graph = pair("pc per sample", guided_model(CUDA), net_dtype=net_dtype)
    for k in range(3):
        given: dict[str, Any] = {
            "cond": {"label": torch.linspace(0, k, 4, device=CUDA)},
            "guidance": torch.linspace(-1, 1 + k, 4),
        }
        assert torch.equal(graph(seed=k, **given), loop(seed=k, **given))


def test_room_and_step_sizes_are_given_to_rows_with_a_norm_only() -> None:
    loop, _ = pair("pc per sample")
    seen: list[tuple[Any, dict[str, Any]]] = []
    step = loop.kernels.affine_step_

    def spy(*args: Any, **kwargs: Any) -> None:
        seen.append((args[9], kwargs))
        step(*args, **kwargs)

    loop.kernels = Kernels("spy", spy)
    loop(seed=0)
    assert [epsilon is not None for epsilon, _ in seen] == (loop.plan.norm != 0).tolist()
    assert all(kwargs["workspace"] is not None and not kwargs["coupled"] for _, kwargs in seen)


def test_graphs_are_reused_without_growth() -> None:
    """Neither memory nor the number of allocations grows with rows or calls."""
    _, graph = pair("pc per sample", shape=(64, 3, 32, 32))
    for _ in range(2):
        graph(seed=0)

    def used() -> tuple[int, int]:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    assert graph._capture is not None
    recordings = [dict(r.graphs) for r in graph._capture._recordings.values()]
    before = used()
    for seed in range(3):
        graph(seed=seed)
    assert used() == before
    assert recordings == [dict(r.graphs) for r in graph._capture._recordings.values()]

    made = []
    for rows in (1, 4):
        run = graph.start(seed=0).advance(3)
        start = torch.cuda.memory_stats()["allocation.all.allocated"]
        run.advance(rows)
        made.append(torch.cuda.memory_stats()["allocation.all.allocated"] - start)
    assert made[0] == made[1]


def test_runs_callbacks_and_states() -> None:
    loop, graph = pair("ode heun")
    first, second = graph.start(seed=0), graph.start(seed=1)
    while first.row < first.plan.rows:
        first.advance(1, callback=lambda step: step.x.zero_())
        second.advance(1)
    assert torch.equal(first.result(), loop(seed=0)) and torch.equal(second.result(), loop(seed=1))
    state = graph.start(seed=3).advance(2).state()
    for sampler in (loop, graph):
        assert torch.equal(sampler.resume(state).advance().result(), loop(seed=3))


def test_streams_and_threads() -> None:
    loop, graph = pair("pc per sample", shape=(16, 3, 32, 32))
    expected = [loop(seed=seed) for seed in range(6)]
    torch.cuda.synchronize()
    results: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results[seed] = graph(seed=seed)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], x) for seed, x in enumerate(expected))


class Convolutions(nn.Module):
    """cuDNN and cuBLAS, which have workspaces of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.time = nn.Linear(1, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * 0.1 + self.time(t[:, None].to(x.dtype))[:, :, None, None] - x


def convolutions() -> Convolutions:
    torch.manual_seed(0)
    return Convolutions().to(CUDA)


def test_libraries_of_the_network() -> None:
    loop, graph = pair("em", convolutions(), shape=(8, 3, 16, 16))
    for seed in (0, 1):
        torch.testing.assert_close(graph(seed=seed), loop(seed=seed), rtol=1e-4, atol=1e-4)


def test_autocast_around_the_first_call() -> None:
    """The graph keeps its casts of the weights, when autocast's own are gone."""
    net = convolutions()
    loop, graph = pair("em", net, shape=(8, 3, 16, 16))
    with torch.autocast(CUDA, torch.bfloat16):
        expected, first = loop(seed=0), graph(seed=0)
    torch.cuda.empty_cache()
    trash = [torch.full((1 << 20,), 9.0, device=CUDA) for _ in range(8)]
    torch.testing.assert_close(first, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(graph(seed=0), first) and len(trash) == 8


def test_weights_changed_in_place_and_replaced() -> None:
    net = capture_cases.Labelled(CUDA)
    loop, graph = pair("em", net, cond={"label": torch.zeros(4, device=CUDA)})
    graph(seed=0)
    with torch.no_grad():
        net.scale.mul_(0.5)
    assert torch.equal(graph(seed=0), loop(seed=0))
    net.to("cpu").to(CUDA)
    net.scale = nn.Parameter(torch.full((), 0.3, device=CUDA))
    assert torch.equal(graph(seed=0), loop(seed=0))


def test_noise_inside_the_network_goes_on() -> None:
    """torch's own generator moves with every replay and follows torch.manual_seed."""
    _, graph = pair("em", lambda x, t: -x + torch.randn_like(x))
    graph(seed=0)
    torch.manual_seed(3)
    first, second = graph(seed=0), graph(seed=0)
    torch.manual_seed(3)
    assert not torch.equal(first, second) and torch.equal(graph(seed=0), first)


def test_a_network_may_differentiate_by_its_input() -> None:
    def energy(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x.requires_grad_()
            return torch.autograd.grad((-(x**2) / 2).sum(), x)[0]

    loop, graph = pair("em", energy)
    for seed in (0, 1):
        assert torch.equal(graph(seed=seed), loop(seed=seed))


def synchronises(x: Tensor, t: Tensor) -> Tensor:
    torch.cuda.synchronize()  # no op of torch: only the capture itself finds it
    return -x


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (lambda x, t: -x * float(t[0]), "host read"),
        (lambda x, t: -x * torch.ones(3, 1).to(x.device), "copies a tensor between"),
        (lambda x, t: -x * torch.tensor([1.0], device=x.device), "Python numbers"),
        (synchronises, "the network synchronises can't be captured: .*captur"),
    ],
)
def test_a_failed_capture_spoils_nothing(net: Callable[..., Tensor], match: str) -> None:
    loop, graph = pair()
    assert torch.equal(graph(seed=0), loop(seed=0))
    _, refused = pair("em", net)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^cuda_graph: .*{match}"):
            refused(seed=0)
    assert torch.cuda.current_stream() == stream
    assert torch.randn(1000, device=CUDA).isfinite().all()
    torch.empty(1 << 24, device=CUDA)
    torch.cuda.empty_cache()
    assert torch.equal(graph(seed=1), loop(seed=1))
    _, other = pair("pc per sample", lambda x, t: cases.network(x, t) + 0 * torch.rand_like(x))
    other(seed=0)
    loop, other = pair("pc sigma")
    assert torch.equal(other(seed=1), loop(seed=1))


def test_the_eager_step_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda_graph: the eager step"):
        Sampler(
            cases.network, VPSDE(), (4, 3), method="em", steps=3, device=CUDA, backend="eager",
            cuda_graph=True,
        )  # fmt: skip


def test_bad_outputs_are_reported_where_they_began() -> None:
    _, graph = pair("em", lambda x, t: torch.where(t.reshape(-1, 1, 1) > 0.5, -x, x / 0.0))
    with pytest.raises(ValueError, match=r"evaluation 5 of \d+"):
        graph(seed=0)
    assert torch.randn(3, device=CUDA).isfinite().all()
