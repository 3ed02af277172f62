"""Inputs of the step, its formula in float64, and the comparisons that the op tests use."""

from dataclasses import dataclass, field, replace

import torch
from op_backends import call
from torch import Tensor

from sbm_fast import noise
from sbm_fast.plan import TAIL_LANES, D, F, X, Z

NOISE_BOUND = 2e-6  # of the law, per unit of the coefficient on z
REGISTERS = 2
WIDTH = 4 + REGISTERS
ROWS = ("start", "plain", "clamped", "history", "batch_mean", "per_sample", "sqrt_d", "scale")
OUTPUTS = ("x", "registers", "net_input", "net_time", "first_bad", "epsilon")


def table() -> tuple[Tensor, Tensor]:
    """Coefficients float64 [R, lanes] and fields int32 [R, 4] of ROWS."""
    value = torch.zeros(len(ROWS), 2 * WIDTH + len(TAIL_LANES), dtype=torch.float64)
    fields = torch.tensor([[-1, 1, r, 0] for r in range(len(ROWS))], dtype=torch.int32)
    rest = 2 * WIDTH

    def row(name: str, out: dict[int, float], write: dict[int, float] | None = None) -> Tensor:
        r = value[ROWS.index(name)]
        for source, c in out.items():
            r[source] = c
        for source, c in (write or {}).items():
            r[WIDTH + source] = c
        r[rest : rest + 6] = torch.tensor([0.3, -0.7, float("inf"), 0.9, 10.0 + 0.1, 1.0])
        return r

    row("start", {Z: 1.7})
    row("plain", {X: 1.0123456789, F: -0.3141592653, Z: 0.2718281828})[rest + 5] = 0.4
    clamped = row("clamped", {X: -0.2, F: 0.6, D: 0.777777777, 4: 0.123456789}, {D: 1.1, X: 0.5})
    clamped[rest + 2] = 0.8
    row("history", {X: 0.9, F: 1 / 3, 4: -0.4, 5: 0.2, Z: -0.6}, {F: 0.7, 5: 0.3, Z: 1.5})
    row("scale", {X: 0.99})[rest + 3 : rest + 5] = 0.0
    fields[ROWS.index("start"), 1] = 0
    fields[ROWS.index("clamped"), 0] = 0
    fields[ROWS.index("history"), 0] = 1
    for norm, name in enumerate(("batch_mean", "per_sample", "sqrt_d"), start=1):
        row(name, {X: 1.0})[rest + 6 :] = torch.tensor([0.05 * norm, 0.11, -0.83])
        fields[ROWS.index(name), 3] = norm
    return value, fields


def pack(value: Tensor, dtype: torch.dtype) -> Tensor:
    """High and low parts, as `Plan.pack` writes them."""
    high = value.to(dtype)
    low = torch.where(torch.isfinite(high), value - high.double(), 0.0).to(dtype)
    return torch.stack([high, low], dim=1)


@dataclass
class Case:
    """Everything that one call of the step reads."""

    x: Tensor
    network: Tensor | None
    row: Tensor
    keys: Tensor
    value: Tensor
    field: Tensor
    registers: Tensor
    uncond: Tensor | None = None
    guidance: Tensor | None = None
    noise: Tensor | None = None
    net_dtype: torch.dtype = torch.float32
    net_format: torch.memory_format = torch.contiguous_format
    first_bad: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def coef(self) -> Tensor:
        return pack(self.value, self.x.dtype)


def make(
    shape: tuple[int, ...],
    rows: list[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    net_dtype: torch.dtype = torch.float32,
    guided: bool = False,
    explicit: bool = False,
    seed: int = 0,
) -> Case:
    """Random inputs; without `rows` every sample stands at another one, −1 and R among them."""
    g = torch.Generator().manual_seed(seed)
    value, fields = table()
    batch = shape[0]
    chosen = torch.arange(batch) % (len(ROWS) + 2) - 1 if rows is None else torch.tensor(rows)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    return Case(
        x=normal(*shape).to(dtype),
        network=normal(*shape).to(net_dtype),
        row=chosen.to(torch.int32),
        keys=noise.keys(seed, batch),
        value=value,
        field=fields,
        registers=normal(REGISTERS, *shape).to(dtype),
        uncond=normal(*shape).to(net_dtype) if guided else None,
        guidance=normal(batch).to(dtype) if guided else None,
        noise=normal(*shape).to(dtype) if explicit else None,
        net_dtype=net_dtype,
        first_bad=torch.full((batch,), -1, dtype=torch.int32),
    )


def run(case: Case, backend: str) -> dict[str, Tensor]:
    """What the step writes; outputs that it may leave alone begin as NaN."""
    batch = len(case.x)
    out = {
        "x": case.x.clone(),
        "registers": case.registers.clone(),
        "net_input": torch.full_like(case.x, float("nan"), dtype=case.net_dtype).contiguous(
            memory_format=case.net_format
        ),
        "net_time": torch.full((batch,), float("nan"), dtype=case.x.dtype),
        "first_bad": case.first_bad.clone(),
        "epsilon": torch.full((batch,), float("nan"), dtype=case.x.dtype),
    }
    call(
        backend, "affine_step_", out["x"], case.network, case.uncond, case.guidance,
        out["registers"], case.keys, case.row, case.coef, case.field, out["epsilon"], case.noise,
        out["net_input"], out["net_time"], out["first_bad"],
    )  # fmt: skip
    return out


def norm_of(case: Case, b: int) -> int:
    row = int(case.row[b])
    return int(case.field[row, 3]) if 0 <= row < len(case.value) else 0


def sample_noise(case: Case, b: int) -> Tensor:
    if case.noise is not None:
        return case.noise[b].double()
    _, stream, draw, _ = case.field[int(case.row[b])].tolist()
    shape = (1, *case.x.shape[1:])
    key = case.keys[b : b + 1]
    return noise.normal(None, shape, keys=key, draw=draw, stream=stream, backend="eager")[
        0
    ].double()


def network_of(case: Case, b: int, dtype: torch.dtype) -> Tensor:
    assert case.network is not None
    f = case.network[b].to(dtype)
    if case.uncond is None or case.guidance is None:
        return f
    factor = case.value[int(case.row[b]), 2 * WIDTH + TAIL_LANES.index("guidance")]
    w = 1 + factor.to(dtype) * (case.guidance[b].to(dtype) - 1)
    u = case.uncond[b].to(dtype)
    return u + w * (f - u)


def epsilons(case: Case, dtype: torch.dtype) -> Tensor:
    """ε [B] in the words of the docstring, norms by torch in `dtype`; 0 at other rows."""
    lane = 2 * WIDTH + TAIL_LANES.index("eps_scale")
    score, z = torch.zeros(len(case.x), dtype=dtype), torch.zeros(len(case.x), dtype=dtype)
    eps = torch.zeros(len(case.x), dtype=dtype)
    normed = [b for b in range(len(case.x)) if norm_of(case, b)]
    for b in normed:
        r = case.value[int(case.row[b])].to(dtype)
        s = r[lane + 1] * case.x[b].to(dtype) + r[lane + 2] * network_of(case, b, dtype)
        score[b], z[b] = s.norm(), sample_noise(case, b).to(dtype).norm()
    together = [b for b in normed if norm_of(case, b) == 1]
    for b in normed:
        kind = norm_of(case, b)
        n_z, n_s = (z[together].mean(), score[together].mean()) if kind == 1 else (z[b], score[b])
        if kind == 3:
            n_z = torch.tensor(float(case.x[0].numel()), dtype=dtype).sqrt()
        scale = case.value[int(case.row[b]), lane].to(dtype)
        eps[b] = scale * (n_z / n_s) ** 2 if n_s > 0 else 0.0
    return eps


def combine(case: Case, b: int, c: Tensor, tail: dict[str, Tensor]) -> Tensor:
    """Σ c_k·v_k of sample b in the dtype of c; a coefficient 0 does not read its value."""
    x = case.x[b].to(c.dtype)
    total = torch.zeros_like(x)
    if c[X] != 0:
        total = total + c[X] * x
    if c[F] != 0:
        total = total + c[F] * network_of(case, b, c.dtype)
    if c[D] != 0:
        d = tail["p"] * x + tail["q"] * network_of(case, b, c.dtype)
        total = total + c[D] * d.clamp(-tail["L"], tail["L"])
    if c[Z] != 0:
        total = total + c[Z] * sample_noise(case, b).to(c.dtype)
    for k in range(REGISTERS):
        if c[4 + k] != 0:
            total = total + c[4 + k] * case.registers[k, b].to(c.dtype)
    return total


def formula(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The step sample by sample in `dtype`, term by term; registers read before they are written.

    float64 is the truth, the state's dtype what plain torch makes of the same formula.
    """
    out = {"x": case.x.to(dtype, copy=True), "registers": case.registers.to(dtype, copy=True)}
    out["epsilon"] = epsilons(case, dtype)
    for b in range(len(case.x)):
        row = int(case.row[b])
        if not 0 <= row < len(case.value):
            continue
        r = case.value[row].to(dtype)
        tail = dict(zip(TAIL_LANES, r[2 * WIDTH :], strict=True))
        out["x"][b] = combine(case, b, r[:WIDTH], tail)
        if norm_of(case, b):
            eps = out["epsilon"][b]
            s = tail["p_s"] * case.x[b].to(dtype) + tail["q_s"] * network_of(case, b, dtype)
            z = sample_noise(case, b).to(dtype)
            out["x"][b] += eps * s + torch.sqrt(2 * eps) * z
        slot = int(case.field[row, 0])
        if slot >= 0:
            out["registers"][slot, b] = combine(case, b, r[WIDTH : 2 * WIDTH], tail)
    return out


def violation(case: Case, out: dict[str, Tensor], slack: float = 0.0) -> str:
    """ "" when `out` is the float64 formula to twice the error of torch at the state's dtype.

    A float64 state has no wider truth beside it, so there it is 8 units in the last place.
    """
    exact, plain = formula(case), formula(case, case.x.dtype)
    ulp = torch.finfo(case.x.dtype).eps * (8 if case.x.dtype == torch.float64 else 1)
    for name in ("x", "registers", "epsilon"):
        e = exact[name]
        if e.numel() == 0:
            continue
        size = float(e.abs().max())
        bound = 2 * float((plain[name].double() - e).abs().max()) + ulp * size + slack
        error = (out[name].double() - e).abs()
        if name == "epsilon":
            error = error[[norm_of(case, b) != 0 for b in range(len(e))]]
        worst = float(error.max()) if error.numel() else 0.0
        if not worst <= bound:
            return f"{name}: off by {worst:.3g}, allowed {bound:.3g}"
    return ""


def same(a: dict[str, Tensor], b: dict[str, Tensor], names: tuple[str, ...] = OUTPUTS) -> str:
    """ "" or the first output that is not equal to the bit, NaN being equal to itself."""
    for name in names:
        if not torch.equal(a[name].nan_to_num(1234.5), b[name].nan_to_num(1234.5)):
            return name
    return ""


def permuted(case: Case, order: Tensor) -> Case:
    """The same samples in another order, or some of them."""

    def pick(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[order]

    return replace(
        case,
        x=case.x[order],
        network=pick(case.network),
        row=case.row[order],
        keys=case.keys[order],
        registers=case.registers[:, order],
        uncond=pick(case.uncond),
        guidance=pick(case.guidance),
        noise=pick(case.noise),
        first_bad=case.first_bad[order],
    )
