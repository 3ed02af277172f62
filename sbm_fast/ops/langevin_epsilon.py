"""Op `langevin_epsilon_`: the step size of data-dependent Langevin rows, one value a sample.

    s = p_s·x + q_s·F,    ε = 2αr²·(n(z)/n(s))²       (0 where s vanishes: the sample rests)

    batch_mean  n(v) = mean of ‖v_b‖ over the samples at such a row (as score_sde runs it)
    per_sample  n(v) = ‖v_b‖
    sqrt_d      n(z) = √d, n(s) = ‖s_b‖

Norms are summed in one fixed tree over the sample's logical order: blocks of 1024 squares are
halved until one value is left, block sums are added neighbour by neighbour. So the result does not
depend on threads, memory format or, but for batch_mean, on the batch. z is regenerated, not stored.

Arguments as in `affine_step_`; epsilon [B] is written, 0 for samples at other rows.
"""

import math

import torch
from torch import Tensor

from sbm_fast.ops._library import register
from sbm_fast.ops._row import Rows, guided_network, row_noise, weighted_sum
from sbm_fast.plan import NORMS, F, X

BLOCK = 1024


def reference(
    epsilon: Tensor,
    x: Tensor,
    network: Tensor,
    uncond: Tensor | None,
    guidance: Tensor | None,
    keys: Tensor,
    row: Tensor,
    coef: Tensor,
    field: Tensor,
    noise: Tensor | None,
) -> None:
    """The step size in plain torch, on any device."""
    if x.numel() == 0:
        return
    rows = Rows.of(row, coef, field)
    f = guided_network(rows, network, uncond, guidance, x)
    form = torch.zeros_like(rows.sources(0))
    form[:, X], form[:, F] = rows.lane("p_s"), rows.lane("q_s")
    score = sample_norm(weighted_sum(form, [x, f] + [None] * (form.shape[1] - 2), x))
    z = sample_norm(row_noise(rows, keys, noise, x))

    norm = rows.number("norm")
    batch_mean = norm == NORMS.index("batch_mean")
    together = batch_mean & rows.live
    score_norm = torch.where(batch_mean, tree_mean(score[together]), score)
    noise_norm = torch.where(batch_mean, tree_mean(z[together]), z)
    root = torch.full_like(z, math.sqrt(x[0].numel()))
    noise_norm = torch.where(norm == NORMS.index("sqrt_d"), root, noise_norm)
    ratio = noise_norm / score_norm
    eps = rows.lane("eps_scale").to(x.dtype) * ratio * ratio
    eps = torch.where(score_norm == 0, torch.zeros_like(eps), eps)
    epsilon.copy_(torch.where(rows.live & (norm != 0), eps, torch.zeros_like(eps)))


def sample_norm(v: Tensor) -> Tensor:
    """‖v_b‖ per sample [B], by the fixed tree."""
    return sample_sum(v**2).sqrt()


def sample_sum(v: Tensor) -> Tensor:
    """Σ_i v_bi per sample [B], by the fixed tree."""
    flat = v.reshape(len(v), -1)
    # A sample below one block needs no more zeros than up to a power of two.
    block = min(BLOCK, 1 << max(0, flat.shape[1] - 1).bit_length())
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % block))
    blocks = padded.reshape(len(v), -1, block)
    while blocks.shape[-1] > 1:
        half = blocks.shape[-1] // 2
        blocks = blocks[..., :half] + blocks[..., half:]
    return _neighbour_sum(blocks[..., 0])


def tree_mean(v: Tensor) -> Tensor:
    """Mean of [B] values, by the tree of neighbours; NaN for none."""
    if v.numel() == 0:
        return v.new_tensor(math.nan)
    return _neighbour_sum(v[None])[0] / v.numel()


def _neighbour_sum(v: Tensor) -> Tensor:
    while v.shape[-1] > 1:
        v = torch.nn.functional.pad(v, (0, v.shape[-1] % 2))
        v = v[..., 0::2] + v[..., 1::2]
    return v[..., 0]


langevin_epsilon_ = register(
    "langevin_epsilon_(Tensor(a!) epsilon, Tensor x, Tensor network, Tensor? uncond, "
    "Tensor? guidance, Tensor keys, Tensor row, Tensor coef, Tensor field, Tensor? noise) -> ()",
    reference,
)
