"""What can't be recorded says why: reads by the host, broken contracts, other conditioning."""

from collections.abc import Callable
from typing import Any

import capture_cases
import pytest
import sampling_cases as cases
import torch
from capture_cases import SHAPE, guided_model, pair, recorded
from torch import Tensor, nn

from sbm_fast import VPSDE, Sampler, ScoreModel, _load, sample
from sbm_fast.capture import HostReads, NotCapturable

pytestmark = pytest.mark.filterwarnings("ignore:norm=:UserWarning", "ignore:the plan cancels")


class Synchronises(nn.Module):
    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.how(x, t)


@pytest.mark.parametrize(
    "how",
    [
        lambda x, t: -x * float(t[0]),
        lambda x, t: -x if bool((x > 0).any()) else x,
        lambda x, t: x.index_put((x > 0,), x[x > 0] * 2),
        lambda x, t: -x * len(torch.nonzero(x)),
        lambda x, t: -x * len(t.unique()),
        lambda x, t: -x * torch.tensor(0.5),
    ],
)
def test_a_network_with_a_part_on_the_host_is_named(how: Any) -> None:
    net = Synchronises(how)
    loop, replay, recorder = pair("em", net)
    run = replay.start(seed=0)
    match = r"cuda_graph: the network Synchronises can't be captured: .*(host.*aten|numbers)"
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            run.advance()
    assert not recorder.tapes and run.row == 1
    expected = loop.start(seed=0).advance(1).state()
    assert all(torch.equal(v, expected[k]) for k, v in run.state().items())
    assert torch.equal(loop.resume(run.state()).advance().result(), loop(seed=0))


def test_indices_by_number_are_no_reading() -> None:
    table = torch.linspace(0.5, 1.5, 10)
    loop, replay, _ = pair("em", lambda x, t: -x * table[(9 * t).long()].reshape(-1, 1, 1))
    assert torch.equal(replay(seed=0), loop(seed=0))


def test_copies_between_devices_are_refused() -> None:
    with capture_cases.fake_gpu():
        x, frequencies = torch.zeros(3, device="cuda:0"), torch.arange(3.0)
        for copies in (
            lambda: x + frequencies.to("cuda:0"),
            lambda: x.to("cpu"),
            lambda: x.clone().copy_(frequencies),
        ):
            with pytest.raises(NotCapturable, match="copies"), HostReads(x.device):
                copies()
        with HostReads(x.device):
            (x + 1).to(torch.float64)
            frequencies.to(torch.float64)


def test_a_failed_recording_leaves_the_sampler_usable() -> None:
    loop, replay, recorder = pair("pc per sample")
    recorder.fail = RuntimeError("operation not permitted when stream is capturing\nmore")
    run = replay.start(seed=0)
    with pytest.raises(ValueError, match=r"^cuda_graph: the network network can't .* capturing;"):
        run.advance()
    state = run.state()
    assert torch.equal(loop.resume(state).advance().result(), loop(seed=0))
    recorder.fail = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        run.advance()
    recorder.fail = None
    assert torch.equal(run.advance().result(), loop(seed=0))
    assert torch.equal(replay(seed=1), loop(seed=1))


BUFFER = torch.zeros(SHAPE)


@pytest.mark.parametrize(
    ("net", "message", "guidance"),
    [
        (lambda x, t, label: x[:, :1], "expected a floating tensor of shape", None),
        (lambda x, t, label: x.long(), "expected a floating tensor of shape", None),
        (lambda x, t, label: x.mul_(-1.0), "changed its input in place", None),
        (lambda x, t, label: x * t.mul_(0.5)[0], "changed its input in place", None),
        (lambda x, t, label: None, "expected a floating tensor of shape", 2.0),
        (lambda x, t, label: torch.mul(x, 2.0, out=BUFFER), "same memory", 2.0),
        pytest.param(
            lambda x, t, label: x.transpose(1, 2), "another view of the state", None,
            marks=pytest.mark.skipif(not _load.COMPILED, reason="the reference allows it"),
        ),
    ],
)  # fmt: skip
def test_the_networks_contract_is_held(net: Any, message: str, guidance: float | None) -> None:
    shape = (4, 5, 5) if "view" in message else SHAPE
    model = ScoreModel(net, null_cond={"label": 0.0})
    given: dict[str, Any] = {"cond": {"label": 1.0}, "guidance": guidance}
    sampler = Sampler(model, VPSDE(), shape, method="em", steps=3, **given)
    recorded(sampler)
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        sampler(seed=0)


@pytest.mark.parametrize(
    ("cond", "match"),
    [
        ({"label": torch.zeros(1)}, r"cond\['label'\]: was captured as torch.float32 \(4,\), got"),
        ({"label": torch.zeros(4).double()}, r"cond\['label'\]: .*got torch.float64 \(4,\)"),
        ({"label": 0.5}, r"cond\['label'\]: was captured as torch.float32 \(4,\), got 0.5"),
        ({"label": torch.zeros(4), "factor": 3.0}, r"cond\['factor'\]: was captured as 2.0, got 3"),
        ({"label": torch.zeros(4), "factor": 2}, r"cond\['factor'\]: was captured as 2.0, got 2;"),
        ({"label": torch.zeros(4), "others": 1}, r"cond: was captured with .*factor.*got.*others"),
    ],
)
def test_conditioning_that_changes_its_kind_is_named(cond: dict[str, Any], match: str) -> None:
    loop, replay, _ = pair("em", guided_model())
    given = {"factor": 2.0, "label": torch.ones(4)}
    replay(seed=0, cond=given)
    with pytest.raises(ValueError, match="^" + match):
        replay(seed=0, cond={"factor": 2.0, **cond} if "others" not in cond else cond)
    assert torch.equal(replay(seed=0, cond=given), loop(seed=0, cond=given))


def test_conditioning_may_be_nested_but_holds_no_objects() -> None:
    def net(x: Tensor, t: Tensor, parts: list[dict[str, Tensor]]) -> Tensor:
        return -x * parts[0]["a"]

    loop, replay, _ = pair("em", net)
    for a in (0.5, 1.5):
        cond = {"parts": [{"a": torch.tensor(a)}]}
        assert torch.equal(replay(seed=0, cond=cond), loop(seed=0, cond=cond))
    with pytest.raises(ValueError, match=r"^cond\['parts'\]\[0\]\['a'\]: .*float64"):
        replay(seed=0, cond={"parts": [{"a": torch.tensor(1.0).double()}]})
    _, replay, _ = pair("em", net)
    with pytest.raises(ValueError, match=r"^cond\['parts'\]\[0\]: .*follows tensors .* ndarray"):
        replay(seed=0, cond={"parts": [torch.ones(1).numpy()]})


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SHAPE[-1], SHAPE[-1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(x)


def test_a_network_that_was_cast_or_moved_is_named() -> None:
    net = Product()
    loop, replay, recorder = pair("em", net)
    expected = loop(seed=0)
    assert torch.equal(replay(seed=0), expected)
    changes: list[tuple[Callable[[], object], str]] = [
        (net.bfloat16, "got torch.bfloat16 on cpu; use another Sampler"),
        (lambda: net.float().to("meta"), "got torch.float32 on meta; use another Sampler"),
    ]
    for change, got in changes:
        weights = {name: value.clone() for name, value in net.state_dict().items()}
        change()
        for _ in range(2):
            match = f"^model: expected linear.weight to be torch.float32 on cpu as .*{got}"
            with pytest.raises(ValueError, match=match):
                replay(seed=0)
        net.to_empty(device="cpu").float().load_state_dict(weights)
        assert torch.equal(replay(seed=0), expected) and torch.equal(loop(seed=0), expected)
    assert len(recorder.tapes) == 3


def test_what_a_graph_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"^cuda_graph: expected a run on a CUDA device.* cpu"):
        sample(cases.network, VPSDE(), (4, 3), cuda_graph=True, backend="eager")
    _, replay, _ = pair("em")
    hook = lambda draw, stream: torch.zeros(SHAPE)  # noqa: E731
    with pytest.raises(ValueError, match=r"^noise: a CUDA graph"):
        replay(seed=0, noise=hook)
    with pytest.raises(ValueError, match=r"^noise: a CUDA graph"):
        replay.resume(replay.start(seed=0).state(), noise=hook)
    sampler = cases.sampler("em", SHAPE, cuda_graph="auto")
    assert sampler._capture is None
