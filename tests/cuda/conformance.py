"""Calls of the ops whose results the CUDA kernels must share with the CPU's to the bit."""

from dataclasses import dataclass, field, replace
from typing import Any

import emulated
import op_cases as cases
import torch
from op_cases import Case
from torch import Tensor

from sbm_fast.plan import TAIL_LANES

NAN = float("nan")
Outputs = dict[str, Tensor | None]
_calls = 0


def call(backend: str, op: str, *arguments: Any) -> None:
    """On CPU tensors: "cpu", "emulated", or "cuda", which works on copies on the GPU.

    Emulated threads and blocks run forward, then backward, then in ever new orders.
    """
    global _calls
    if backend == "cpu":
        getattr(torch.ops.sbm_fast, op)(*arguments)
    elif backend == "emulated":
        _calls += 1
        with emulated.emulator().order(_calls % 5 if _calls % 5 < 2 else _calls):
            getattr(emulated, op)(*arguments)
    else:
        import op_backends

        op_backends.call(backend, op, *arguments)


@dataclass
class Bands:
    """Tensors that stand in the middle of larger memory, of which nothing else may change."""

    offset: int = 32
    held: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def put(self, name: str, t: Tensor | None) -> Tensor | None:
        """A copy of t with t's strides; `offset` elements before and behind it."""
        if t is None:
            return None
        reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        memory = t.new_full((max(reach + 1, 0) + 2 * self.offset,), -77 if _whole(t) else NAN)
        view = memory.as_strided(t.shape, t.stride(), self.offset)
        view.copy_(t)
        self.held.append((name, view, memory))
        return view

    def check(self) -> None:
        for name, view, memory in self.held:
            free = torch.ones_like(memory, dtype=torch.bool)
            free.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
            rest = memory[free]
            assert (rest == -77).all() if _whole(view) else rest.isnan().all(), name


def _whole(t: Tensor) -> bool:
    return not t.is_floating_point()


def differences(a: Tensor, b: Tensor) -> int:
    """Elements that are not equal to the bit, NaNs being equal."""
    if _whole(a):
        return int((a != b).sum())
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    other = a.contiguous().view(whole) != b.contiguous().view(whole)
    return int((other & ~(a.isnan() & b.isnan())).sum())


def outputs(case: Case, bands: Bands, net_input: Tensor | None) -> Outputs:
    """What a step writes, poisoned with NaN where the step may leave it alone."""
    batch, dtype = len(case.x), case.x.dtype
    out = {
        "x": case.x,
        "registers": case.registers,
        "net_input": net_input,
        "net_time": torch.full((batch,), NAN, dtype=dtype),
        "first_bad": case.first_bad,
        "epsilon": torch.full((batch,), NAN, dtype=dtype),
    }
    return {name: bands.put(name, t) for name, t in out.items()}


def step(
    backend: str,
    case: Case,
    *,
    net_input: Tensor | None = None,
    offset: int = 32,
    leave_out: tuple[str, ...] = (),
    **extra: Any,
) -> Outputs:
    """One step on banded outputs; by default with a net_input of the network's dtype.

    extra: workspace and coupled, in this order.
    """
    if net_input is None:
        net_input = torch.full_like(case.x, NAN, dtype=case.net_dtype)
        net_input = net_input.contiguous(memory_format=case.net_format)
    bands = Bands(offset)
    out = outputs(case, bands, net_input) | dict.fromkeys(leave_out)
    call(
        backend, "affine_step_",
        out["x"], case.network, case.uncond, case.guidance, out["registers"], case.keys, case.row,
        case.coef, case.field, out["epsilon"], case.noise, out["net_input"], out["net_time"],
        out["first_bad"], *extra.values(),
    )  # fmt: skip
    bands.check()
    return out


def agree(backend: str, case: Case, **how: Any) -> Outputs:
    """The backend's outputs, which are the CPU's."""
    expected, got = step("cpu", case, **how), step(backend, case, **how)
    for name, e in expected.items():
        g = got[name]
        if e is not None and g is not None:
            wrong = differences(g, e)
            assert wrong == 0, f"{name}: {wrong} of {e.numel()} elements"
    return got


def epsilon_of(backend: str, case: Case) -> Tensor:
    bands = Bands()
    out = bands.put("epsilon", torch.full((len(case.x),), NAN, dtype=case.x.dtype))
    assert out is not None
    call(
        backend, "langevin_epsilon_",
        out, case.x, case.network, case.uncond, case.guidance, case.keys, case.row, case.coef,
        case.field, case.noise,
    )  # fmt: skip
    bands.check()
    return out


def random_case(registers: int, seed: int, shape: tuple[int, ...], **how: Any) -> Case:
    """A table of random rows: every coefficient and every field there or not."""
    case = cases.make(shape, **how)
    g = torch.Generator().manual_seed(seed)
    rows, sources = 12, 4 + registers
    value = torch.randn(rows, 2 * sources + len(TAIL_LANES), generator=g, dtype=torch.float64)
    value *= torch.rand(value.shape, generator=g) < 0.6
    value[:, 2 * sources + TAIL_LANES.index("L")] = value[:, 0].abs()
    fields = torch.zeros(rows, 4, dtype=torch.int32)
    fields[:, 0] = torch.randint(-1, registers, (rows,), generator=g) if registers else -1
    fields[:, 1] = torch.randint(0, 3, (rows,), generator=g)
    fields[:, 2] = torch.randint(0, 2**31 - 1, (rows,), generator=g)
    fields[:, 3] = torch.randint(0, 4, (rows,), generator=g)
    return replace(
        case,
        value=value,
        field=fields,
        row=torch.randint(-1, rows + 1, (shape[0],), generator=g).to(torch.int32),
        registers=torch.randn(registers, *shape, generator=g, dtype=torch.float64).to(case.x.dtype),
    )


def without_registers(case: Case) -> tuple[Tensor, Tensor]:
    keep = [*range(4), *range(cases.WIDTH, cases.WIDTH + 4)]
    keep += range(2 * cases.WIDTH, case.value.shape[1])
    return cases.pack(case.value[:, keep], case.x.dtype), case.field
