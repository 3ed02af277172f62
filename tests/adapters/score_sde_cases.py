"""Small configurations of score_sde, in the form of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

Config = SimpleNamespace


def config(name: str, sde: str, *, continuous: bool, centered: bool, **model: Any) -> Config:
    """The entries that score_sde's networks read."""
    common: dict[str, Any] = dict(
        name=name,
        nf=8,
        ch_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(4,),
        conditional=True,
        resamp_with_conv=True,
        scale_by_sigma=sde == "vesde",
        sigma_min=0.01,
        sigma_max=50.0,
        beta_min=0.1,
        beta_max=20.0,
        num_scales=1000,
        nonlinearity="swish",
        normalization="GroupNorm",
        dropout=0.1,
        init_scale=0.0,
    )
    return Config(
        model=Config(**(common | model)),
        data=Config(image_size=8, num_channels=3, centered=centered),
        training=Config(sde=sde, continuous=continuous),
    )


_PLUS = dict(
    embedding_type="positional",
    resblock_type="biggan",
    fir=False,
    fir_kernel=[1, 3, 3, 1],
    skip_rescale=True,
    progressive="none",
    progressive_input="none",
    progressive_combine="sum",
    attention_type="ddpm",
)
_FOURIER = dict(
    embedding_type="fourier",
    fourier_scale=16,
    fir=True,
    progressive="output_skip",
    progressive_input="input_skip",
)
CASES = {
    "ncsnpp_ve": config("ncsnpp", "vesde", continuous=True, centered=False, **(_PLUS | _FOURIER)),
    "ddpmpp_subvp": config("ncsnpp", "subvpsde", continuous=True, centered=True, **_PLUS),
    "ddpm_ladder": config("ddpm", "vesde", continuous=False, centered=False, nf=32, ch_mult=(1, 1)),
}
