"""Presets: sizes of the published networks, and what each carries."""

from __future__ import annotations

import pytest
import torch

import sbm_fast
from sbm_fast.model import as_score_model
from sbm_fast.nn import ADM, DDPM, NCSNpp, Network, UNet, presets
from sbm_fast.sde import EDMSDE, VESDE, VPSDE, DDPMSchedule, NCSNLadder, SubVPSDE

MILLIONS = {
    # Counted on the authors' code.
    "ddpmpp_cifar10": 61.80,
    "ncsnpp_cifar10": 62.76,
    "ddpmpp_deep_cifar10": 106.6,
    "ncsnpp_deep_cifar10": 107.6,
    "ddpm_cifar10": 35.2,
    "edm_cifar10_uncond_vp": 55.7,
    "edm_cifar10_uncond_ve": 56.4,
    "edm_ffhq64_uncond_vp": 61.8,
    "edm_imagenet64_cond_adm": 295.9,
}


def on_meta(name: str) -> Network:
    with torch.device("meta"):
        return Network.from_preset(name)


@pytest.mark.parametrize("name", MILLIONS)
def test_number_of_parameters(name: str) -> None:
    assert on_meta(name).num_parameters() / 1e6 == pytest.approx(MILLIONS[name], abs=0.06)


@pytest.mark.parametrize("name", [name for name in presets.names() if name not in MILLIONS])
def test_every_other_one_can_be_built(name: str) -> None:
    with torch.device("meta"):
        net = UNet.from_preset(name, num_blocks=1)
    assert as_score_model(net, net.sde).net is net
    size = net.config["image_size"]
    assert net.sample_shape == (3, size, size)
    assert net.metadata["data_range"] == ([0, 1] if name.startswith("ve/") else [-1, 1])
    assert net.metadata["preset"] == name


@pytest.mark.parametrize(
    ("name", "cls", "predicts", "time", "sde"),
    [
        ("ddpmpp_cifar10", NCSNpp, "eps", "999t", VPSDE(0.1, 20.0)),
        ("ncsnpp_cifar10", NCSNpp, "score", "sigma", VESDE(0.01, 50.0)),
        ("subvp/cifar10_ddpmpp_continuous", NCSNpp, "eps", "999t", SubVPSDE(0.1, 20.0)),
        ("vp/ddpm/cifar10", DDPM, "eps", "index", DDPMSchedule.linear(1000, 1e-4, 0.02)),
        ("ve/cifar10_ddpm", DDPM, "score", "index", NCSNLadder.geometric(50.0, 0.01, 1000)),
        ("ve/church_ncsnpp_continuous", NCSNpp, "score", "sigma", VESDE(0.01, 380.0)),
        ("edm_imagenet64_cond_adm", ADM, "edm", "edm", EDMSDE(0.002, 80.0)),
    ],
)
def test_what_it_was_trained_as(
    name: str, cls: type[Network], predicts: str, time: str, sde: object
) -> None:
    net = on_meta(name)
    assert type(net) is cls
    assert (net.predicts, net.time, net.sde) == (predicts, time, sde)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no preset 'ddpmp_cifar10'.*ddpmpp_cifar10"):
        UNet.from_preset("ddpmp_cifar10")
    with pytest.raises(ValueError, match=r"no preset 'EDM_CIFAR10_COND_VP'.* edm_cifar10_cond_vp"):
        UNet.from_preset("EDM_CIFAR10_COND_VP")
    assert "edm_cifar10_cond_vp" in sbm_fast.nn.presets.names()


def test_overrides() -> None:
    net = UNet.from_preset("ddpmpp_cifar10", channels=8, image_size=16, sample_shape=(3, 8, 8))
    assert net.config["channels"] == 8 and net.sample_shape == (3, 8, 8)
    with pytest.raises(TypeError, match="surprise"):
        UNet.from_preset("ddpmpp_cifar10", surprise=1)
