"""Op `affine_step_`: one row of a plan applied to every sample, in place.

    x'  = a·x + b·F + c0·D + d·z + Σ c_k·H_k          D = clamp(p·x + q·F, ±L)
    H_s = the same form with the row's write coefficients
    F   = F_u + w·(F_c − F_u)                         when `uncond` is given

A row of a data-dependent Langevin norm adds ε·s + √(2ε)·z with s = p_s·x + q_s·F; its ε is found
first (see `langevin_epsilon_`). The row reads everything before it writes, and reads nothing whose
coefficient is 0. z is made from the sample's key at (draw, stream) of the row, never stored.

Arguments (B samples; S the state's dtype, float32 or float64):
    x [B, …] S: the state, updated. Any memory format.
    network, uncond [B, …]: F_c and F_u, any float dtype and memory format.
    guidance [B] S: the guidance weight w; the row's factor g makes it 1 + g·(w − 1).
    registers [K, B, …] S: H_k, one of them written by rows that have a slot.
    keys int64 [B]; row int32 [B] (it is read, never advanced; outside [0, R) nothing happens).
    coef [R, 2, lanes] S, field int32 [R, 4]: `Plan.pack`.
    epsilon [B] S: receives the step sizes, 0 for rows without a norm; those with one need it.
    noise [B, …]: used as z instead of the counter-based one.
    net_input [B, …] any float dtype and memory format: receives c_in·x' of the next evaluation.
    net_time [B] S: receives the next evaluation's time label.
    first_bad int32 [B]: receives the row at which F was first not finite, where it is negative.
    workspace: from `workspace_for(x)`, kept between calls; GPUs sum norms in it (without it they
        allocate one). Not used on the CPU.
    coupled: False promises that no row has the norm "batch_mean", which couples the samples. On a
        GPU a sample that fits on chip then takes one launch.
"""

import torch
from torch import Tensor

from sbm_fast.ops import langevin_epsilon
from sbm_fast.ops._library import register
from sbm_fast.ops._row import Rows, guided_network, per_sample, row_noise, weighted_sum
from sbm_fast.plan import H0, NORMS, D, F, X, Z

BATCH_MEAN = NORMS.index("batch_mean")


def workspace_for(x: Tensor) -> Tensor:
    """The `workspace` that GPU kernels need for rows with a norm, zeroed as they expect it.

    A ticket, then norms of score and noise: one pair a sample, and one a block of `BLOCK` elements.
    """
    batch = x.shape[0]
    blocks = -(-(x[0].numel() if batch else 0) // langevin_epsilon.BLOCK)
    return x.new_zeros(4 + 2 * batch * (1 + blocks))


def reference(
    x: Tensor,
    network: Tensor | None,
    uncond: Tensor | None,
    guidance: Tensor | None,
    registers: Tensor | None,
    keys: Tensor,
    row: Tensor,
    coef: Tensor,
    field: Tensor,
    epsilon: Tensor | None,
    noise: Tensor | None,
    net_input: Tensor | None,
    net_time: Tensor | None,
    first_bad: Tensor | None,
    workspace: Tensor | None = None,
    coupled: bool = True,
) -> None:
    """The step in plain torch, on any device."""
    if x.numel() == 0:
        return
    rows = Rows.of(row, coef, field)
    if not coupled and (rows.live & (rows.number("norm") == BATCH_MEAN)).any():
        raise RuntimeError("coupled: is False, but a row couples the samples (batch_mean)")
    f = None if network is None else guided_network(rows, network, uncond, guidance, x)
    if f is not None and first_bad is not None:
        _note_bad(rows, f, row, first_bad)
    weights, write_weights = rows.sources(0), rows.sources(1)
    if epsilon is not None and network is not None:
        langevin_epsilon.reference(
            epsilon, x, network, uncond, guidance, keys, row, coef, field, noise
        )
        weights = _add_langevin(rows, weights, epsilon)
    reads = ((weights != 0) | (write_weights != 0)) & rows.live[:, None]
    used = reads.any(0).tolist()
    if network is None and (used[F] or used[D]):
        raise RuntimeError("network: a row needs it")
    values = [x, f, *[None] * (len(used) - 2)]
    if used[D]:
        values[D] = _denoised(rows, x, f)
    if used[Z]:
        values[Z] = row_noise(rows, keys, noise, x)
    if registers is not None:
        values[H0:] = [registers[k] if used[H0 + k] else None for k in range(rows.registers)]
    new = weighted_sum(weights, values, x)
    if registers is not None:
        written = weighted_sum(write_weights, values, x)
        for k in range(rows.registers):
            here = per_sample(rows.live & (rows.number("slot") == k), x)
            registers[k].copy_(torch.where(here, written, registers[k]))
    x.copy_(torch.where(per_sample(rows.live, x), new, x))
    _next_input(rows, x, net_input, net_time)


def _denoised(rows: Rows, x: Tensor, f: Tensor | None) -> Tensor | None:
    if f is None:
        return None
    form = torch.zeros_like(rows.sources(0))
    form[:, X], form[:, F] = rows.lane("p"), rows.lane("q")
    limit = per_sample(rows.lane("L").to(x.dtype), x)
    d = weighted_sum(form, [x, f] + [None] * (form.shape[1] - 2), x)
    return torch.clamp(d, -limit, limit)


def _add_langevin(rows: Rows, weights: Tensor, epsilon: Tensor) -> Tensor:
    eps = torch.where(rows.number("norm") != 0, epsilon.double(), 0.0)
    extra = torch.zeros_like(weights)
    extra[:, X] = eps * rows.lane("p_s")
    extra[:, F] = eps * rows.lane("q_s")
    extra[:, Z] = torch.sqrt(2.0 * eps)
    return weights + extra


def _note_bad(rows: Rows, f: Tensor, row: Tensor, first_bad: Tensor) -> None:
    reads = (rows.sources(0)[:, [F, D]] != 0).any(1) | (rows.sources(1)[:, [F, D]] != 0).any(1)
    reads |= rows.number("norm") != 0
    bad = ~torch.isfinite(f).reshape(len(f), -1).all(1) & reads & rows.live & (first_bad < 0)
    first_bad.copy_(torch.where(bad, row, first_bad))


def _next_input(rows: Rows, x: Tensor, net_input: Tensor | None, net_time: Tensor | None) -> None:
    scale = rows.lane("c_in_next").to(x.dtype)
    here = rows.live & (scale != 0)
    if net_input is not None:
        scaled = (per_sample(scale, x) * x).to(net_input.dtype)
        net_input.copy_(torch.where(per_sample(here, x), scaled, net_input))
    if net_time is not None:
        net_time.copy_(torch.where(here, rows.lane("label_next").to(net_time.dtype), net_time))


affine_step_ = register(
    "affine_step_(Tensor(a!) x, Tensor? network, Tensor? uncond, Tensor? guidance, "
    "Tensor(b!)? registers, Tensor keys, Tensor row, Tensor coef, Tensor field, "
    "Tensor(c!)? epsilon, Tensor? noise, Tensor(d!)? net_input, Tensor(e!)? net_time, "
    "Tensor(f!)? first_bad, Tensor(g!)? workspace=None, bool coupled=True) -> ()",
    reference,
)
