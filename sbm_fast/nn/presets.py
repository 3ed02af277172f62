"""Published configurations by name.

score_sde's have the names of its ``configs/`` (Song et al. 2021): "vp/cifar10_ddpmpp_continuous";
EDM's (Karras et al. 2022, app. F) are called after its files: "edm_cifar10_cond_vp".
`ALIASES` are short names. "vp" and "ve" in EDM's names say which architecture (DDPM++ or NCSN++);
all of them are trained with EDM's own preconditioning.

``metadata["data_range"]`` is the range of the data that the network was trained on.
"""

from __future__ import annotations

import difflib
import functools
from typing import Any

from sbm_fast.ladder import DDPMSchedule, NCSNLadder
from sbm_fast.nn.adm import ADM
from sbm_fast.nn.ncsnpp import DDPM, NCSNpp
from sbm_fast.nn.network import Network
from sbm_fast.nn.songunet import SongUNet
from sbm_fast.sde import EDMSDE, VESDE, VPSDE, SubVPSDE

Preset = tuple[type[Network], dict[str, Any]]

ALIASES = {
    "ddpmpp_cifar10": "vp/cifar10_ddpmpp_continuous",
    "ddpmpp_deep_cifar10": "vp/cifar10_ddpmpp_deep_continuous",
    "ncsnpp_cifar10": "ve/cifar10_ncsnpp_continuous",
    "ncsnpp_deep_cifar10": "ve/cifar10_ncsnpp_deep_continuous",
    "ddpm_cifar10": "vp/ddpm/cifar10",
}
_FIR = (1, 3, 3, 1)
_UNIT, _SYMMETRIC = [0, 1], [-1, 1]


def names() -> list[str]:
    """All names that `build` knows."""
    return [*_presets(), *ALIASES]


def build(name: str, **overrides: Any) -> Network:
    """See `Network.from_preset`."""
    presets = _presets()
    found = presets.get(ALIASES.get(name, name))
    if found is None:
        near = difflib.get_close_matches(str(name).lower(), names(), n=3, cutoff=0.0)
        raise ValueError(f"there is no preset {name!r:.200}; the nearest are {', '.join(near)}")
    cls, arguments = found
    net = cls(**{**arguments, **overrides})
    size, channels = net.config["image_size"], net.config["in_channels"]
    if net.sample_shape is None:
        net.sample_shape = (channels, size, size)
    centered = net.config.get("centered", True)
    net.metadata = {"preset": name, "data_range": _SYMMETRIC if centered else _UNIT}
    return net


@functools.cache
def _presets() -> dict[str, Preset]:
    return _cifar10() | _other_sizes() | _edm()


def _ve(sigma_max: float, levels: int | None = None) -> dict[str, Any]:
    """Networks of the score on [0, 1], continuous or on a ladder of ``levels``."""
    common = {"scale_by_sigma": True, "centered": False, "predicts": "score"}
    common |= {"sigma_min": 0.01, "sigma_max": float(sigma_max)}
    if levels is None:
        sde = VESDE(0.01, float(sigma_max))
        return {**common, "embedding": "fourier", "time": "sigma", "sde": sde}
    ladder = NCSNLadder.geometric(sigma_max, 0.01, levels)
    return {
        **common,
        **{"num_scales": levels, "ascending_labels": True},
        **{"time": "index", "sde": ladder},
    }


def _cifar10() -> dict[str, Preset]:
    """score_sde's configurations of 32x32."""
    ncsnpp: dict[str, Any] = {"fir": True, "progressive_input": "residual"}
    ddpmpp: dict[str, Any] = {}
    deep = {"num_blocks": 8}
    vp = {"time": "999t", "sde": VPSDE()}
    subvp = {"time": "999t", "sde": SubVPSDE()}
    chain = {"time": "index", "sde": DDPMSchedule.linear()}
    ve, ladder = _ve(50), _ve(50, 1000)
    found: dict[str, Preset] = {
        "vp/cifar10_ddpmpp": (NCSNpp, ddpmpp | chain),
        "vp/cifar10_ncsnpp": (NCSNpp, ncsnpp | chain),
        "vp/ddpm/cifar10": (DDPM, chain),
        "vp/ddpm/cifar10_continuous": (DDPM, vp),
        "vp/ddpm/cifar10_unconditional": (DDPM, chain | {"conditional": False}),
        "subvp/cifar10_ddpm_continuous": (DDPM, subvp),
        "ve/cifar10_ddpm": (DDPM, ladder),
        "ve/cifar10_ncsnpp": (NCSNpp, ncsnpp | ladder),
        "ve/cifar10_ncsnpp_continuous": (NCSNpp, ncsnpp | ve),
        "ve/cifar10_ncsnpp_deep_continuous": (NCSNpp, ncsnpp | deep | ve),
    }
    for kind, sde in (("vp", vp), ("subvp", subvp)):
        for name, design in (("ddpmpp", ddpmpp), ("ncsnpp", ncsnpp)):
            found[f"{kind}/cifar10_{name}_continuous"] = (NCSNpp, design | sde)
            found[f"{kind}/cifar10_{name}_deep_continuous"] = (NCSNpp, design | deep | sde)
    return found


def _other_sizes() -> dict[str, Preset]:
    """score_sde's configurations of 64x64, 256x256 and 1024x1024."""
    pyramids = {"fir": True, "progressive": "output_skip", "progressive_input": "input_skip"}
    large: dict[str, Any] = {
        **pyramids,
        **{"image_size": 256, "channel_mult": (1, 1, 2, 2, 2, 2, 2), "num_blocks": 2},
        **{"num_scales": 2000, "dropout": 0.0},
    }
    largest: dict[str, Any] = {
        **pyramids,
        **{"image_size": 1024, "channels": 16, "channel_mult": (1, 2, 4, 8, 16, 32, 32, 32)},
        **{"num_blocks": 1, "num_scales": 2000, "dropout": 0.0},
    }
    celeba = {"image_size": 64, "fir": True, "progressive_input": "residual"}
    ddpm: dict[str, Any] = {
        **{"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "dropout": 0.0},
        **{"time": "index", "sde": DDPMSchedule.linear()},
    }
    return {
        "ve/celeba_ncsnpp": (NCSNpp, celeba | _ve(90, 1000)),
        "ve/church_ncsnpp_continuous": (NCSNpp, large | _ve(380)),
        "ve/bedroom_ncsnpp_continuous": (NCSNpp, large | _ve(378)),
        "ve/celebahq_256_ncsnpp_continuous": (NCSNpp, large | _ve(348)),
        "ve/ffhq_256_ncsnpp_continuous": (NCSNpp, large | _ve(348)),
        "ve/celebahq_ncsnpp_continuous": (NCSNpp, largest | _ve(1348)),
        "ve/ffhq_ncsnpp_continuous": (NCSNpp, largest | _ve(1348)),
        "vp/ddpm/church": (DDPM, ddpm),
        "vp/ddpm/bedroom": (DDPM, ddpm),
        "vp/ddpm/celebahq": (DDPM, ddpm),
    }


def _edm() -> dict[str, Preset]:
    """EDM's configurations."""
    edm = {"predicts": "edm", "time": "edm", "sigma_data": 0.5, "sde": EDMSDE()}
    designs: dict[str, dict[str, Any]] = {
        "vp": {},
        "ve": {
            **{"embedding": "fourier", "channel_mult_noise": 2},
            **{"encoder": "residual", "fir_kernel": _FIR},
        },
    }
    cifar10 = {"channel_mult": (2, 2, 2), "dropout": 0.13, "augment_dim": 9, **edm}
    large = {"image_size": 64, "channel_mult": (1, 2, 2, 2), "augment_dim": 9, **edm}
    imagenet = {"image_size": 64, "label_dim": 1000, "dropout": 0.1, **edm}
    found: dict[str, Preset] = {"edm_imagenet64_cond_adm": (ADM, imagenet)}
    for name, design in designs.items():
        found[f"edm_cifar10_uncond_{name}"] = (SongUNet, design | cifar10)
        found[f"edm_cifar10_cond_{name}"] = (SongUNet, design | cifar10 | {"label_dim": 10})
        found[f"edm_ffhq64_uncond_{name}"] = (SongUNet, design | large | {"dropout": 0.05})
        found[f"edm_afhqv2_uncond_{name}"] = (SongUNet, design | large | {"dropout": 0.25})
    return found
