"""diffusers: the loaded network gives what its own does, and samples as its schedulers step."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import sbm_fast
from sbm_fast import EDMSDE, VESDE, DDPMSchedule
from sbm_fast.adapters.diffusers import load, wrap

SMALL: dict[str, Any] = dict(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
)
CHAIN: dict[str, Any] = dict(num_train_timesteps=20, beta_start=1e-3, beta_end=0.3)
SHAPE = (2, 1, 8, 8)


def unet(**changes: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**(SMALL | changes)).eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder; tests that change something copy it."""
    path = tmp_path_factory.mktemp("pipeline")
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(**CHAIN)).save_pretrained(path)
    return path


@pytest.fixture
def folder(pipeline: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pipeline, tmp_path / "copy")


def draws(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


@torch.no_grad()
def test_a_pipeline_gives_the_same_network(pipeline: Path) -> None:
    model, net = load(pipeline), unet()
    assert model.predicts == "eps" and model.time == "index" and model.sample_shape == (1, 8, 8)
    assert model.sde == DDPMSchedule.linear(20, 1e-3, 0.3)
    x, label = draws(1)[0], torch.tensor([3.0, 17.0])
    assert torch.equal(model(x, label), net(x, label.long()).sample)
    assert not model.net.training


@pytest.mark.parametrize("layout", ["network beside its schedule", "first releases"])
@torch.no_grad()
def test_other_folders(folder: Path, layout: str) -> None:
    if layout == "first releases":
        (folder / "scheduler" / "scheduler_config.json").rename(folder / "scheduler_config.json")
        for file in (folder / "unet").iterdir():
            file.rename(folder / file.name)
        (folder / "unet").rmdir()
        (folder / "scheduler").rmdir()
    else:
        shutil.copy(folder / "scheduler" / "scheduler_config.json", folder / "unet")
        folder = folder / "unet"
    x, label = draws(1)[0], torch.tensor([3.0, 17.0])
    assert torch.equal(load(folder)(x, label), unet()(x, label).sample)


@torch.no_grad()
def test_weights_in_parts_and_of_older_releases(folder: Path, tmp_path: Path) -> None:
    x, label = draws(1)[0], torch.tensor([3.0, 17.0])
    theirs = unet()(x, label).sample
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = safetensors.torch.load_file(file)
    for new, old in names.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    assert any("proj_attn" in name for name in weights)
    safetensors.torch.save_file(weights, file)
    assert torch.equal(load(folder)(x, label), theirs)

    file.unlink()
    unet().save_pretrained(folder / "unet", max_shard_size="20KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    assert torch.equal(load(folder)(x, label), theirs)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@torch.no_grad()
def test_sampling_as_ddpm_scheduler_steps(monkeypatch: pytest.MonkeyPatch, prediction: str) -> None:
    scheduler = diffusers.DDPMScheduler(**CHAIN, clip_sample=False, prediction_type=prediction)
    net = unet()
    z = draws(20)
    ahead = iter(z[1:])
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: next(ahead))
    x = z[0]
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t).sample, t, x).prev_sample
    model = wrap(net, scheduler)
    ours = sbm_fast.sample(
        model,
        model.sde,
        SHAPE,
        method="ddpm",
        variance="beta_tilde",
        noise=lambda draw, _: z[draw],
    )
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sampling_as_ddim_scheduler_steps(pipeline: Path) -> None:
    scheduler = diffusers.DDIMScheduler(**CHAIN, clip_sample=False, set_alpha_to_one=True)
    net, x = unet(), draws(1)[0]
    begin = x
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t).sample, t, x).prev_sample
    model = load(pipeline)
    ours = sbm_fast.sample(model, model.sde, SHAPE, method="ddim", x_init=begin)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "EulerDiscrete"])
def test_noise_levels_are_the_schedulers_own(kind: str) -> None:
    net = unet()
    schedules = ["linear", "scaled_linear", "squaredcos_cap_v2"]
    options: list[dict[str, Any]] = [dict(beta_schedule=schedule) for schedule in schedules]
    options.append(dict(trained_betas=np.linspace(0.01, 0.4, 20).tolist()))
    for option in options + [dict(beta_schedule="sigmoid")] * (kind == "DDPM"):
        scheduler = getattr(diffusers, f"{kind}Scheduler")(**(CHAIN | option))
        sde = wrap(net, scheduler).sde
        assert isinstance(sde, DDPMSchedule)
        # The schedulers' own tables are float32, products of them too.
        np.testing.assert_allclose(sde.betas, scheduler.betas.numpy(), rtol=1e-5)
        np.testing.assert_allclose(sde.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=3e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_edm_schedulers_give_the_same_denoised(prediction: str) -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7, prediction_type=prediction)
    net = unet()
    model = wrap(net, scheduler)
    assert model.sde == EDMSDE(0.002, 80.0) and model.sigma_data == 0.7
    for sigma in (0.01, 0.6, 40.0):
        x = draws(1)[0] * sigma
        label = scheduler.precondition_noise(sigma)
        F = net(scheduler.precondition_inputs(x, torch.tensor(sigma)), label).sample
        theirs = scheduler.precondition_outputs(x, F, torch.tensor(sigma))
        at = model.match(EDMSDE(), sigma)
        ours = at.denoiser.x * x + at.denoiser.F * model(at.c_in * x, torch.full((2,), at.label))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_score_sde_ve() -> None:
    net = unet(
        time_embedding_type="fourier",
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32),
        norm_num_groups=32,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )
    model = wrap(net, diffusers.ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=30.0))
    assert model.sde == VESDE(0.02, 30.0) and model.predicts == "score"
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 8.0])
    at = model.match(VESDE(0.02, 30.0), VESDE(0.02, 30.0).time_at_nsr(8.0))
    assert at.label == pytest.approx(8.0)
    assert torch.equal(model(x, sigma), net(x, sigma).sample)


def test_learned_variance() -> None:
    net = unet(out_channels=2)
    scheduler = diffusers.DDPMScheduler(**CHAIN, variance_type="learned_range")
    model = wrap(net, scheduler)
    assert model.variance == "learned_range"
    x = sbm_fast.sample(model, model.sde, SHAPE, method="ddpm", steps=3, seed=0)
    assert x.shape == SHAPE and torch.isfinite(x).all()
    with pytest.raises(ValueError, match="out_channels: expected 1 for in_channels = 1"):
        wrap(net, diffusers.DDPMScheduler(**CHAIN))


@torch.no_grad()
def test_classes(tmp_path: Path) -> None:
    diffusers.DDPMPipeline(
        unet(num_class_embeds=3), diffusers.DDPMScheduler(**CHAIN)
    ).save_pretrained(tmp_path)
    model, net = load(tmp_path), unet(num_class_embeds=3)
    x, label, y = draws(1)[0], torch.tensor([3.0, 17.0]), torch.tensor([0, 2])
    assert torch.equal(model(x, label, class_labels=y), net(x, label, y).sample)
    model.null_cond = {"class_labels": torch.tensor([1, 1])}
    options: dict[str, Any] = dict(method="ddim", steps=2, seed=0)
    sbm_fast.sample(model, model.sde, SHAPE, cond={"class_labels": y}, guidance=2.0, **options)


def test_a_table_of_times_takes_whole_levels() -> None:
    net = unet(time_embedding_type="learned", num_train_timesteps=20)
    model = wrap(net, diffusers.DDPMScheduler(**CHAIN))
    x = draws(1)[0]
    torch.testing.assert_close(
        model(x, torch.tensor([3.0, 17.0])), net(x, torch.tensor([3, 17])).sample
    )


@torch.no_grad()
def test_other_networks_of_diffusers_are_wrapped_live() -> None:
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        **SMALL
        | dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=6,
        )
    ).eval()
    model = wrap(net, diffusers.DDPMScheduler(**CHAIN))
    x, label, text = draws(1)[0], torch.tensor([3.0, 17.0]), torch.randn(2, 5, 6)
    theirs = net(x, label, text).sample
    assert torch.equal(model(x, label, encoder_hidden_states=text), theirs)


def test_networks_of_signals_tell_no_shape() -> None:
    net = diffusers.UNet1DModel(sample_size=32, block_out_channels=(32, 32), layers_per_block=1,
                                down_block_types=("DownBlock1D", "DownBlock1D"),
                                up_block_types=("UpBlock1D", "UpBlock1D"))  # fmt: skip
    assert wrap(net, diffusers.DDPMScheduler(**CHAIN)).sample_shape is None


def test_derived_schedulers_are_known() -> None:
    class Own(diffusers.DDPMScheduler):
        pass

    assert wrap(unet(), Own(**CHAIN)).sde == DDPMSchedule.linear(20, 1e-3, 0.3)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "scheduler: expected one of DDPMScheduler"),
        (diffusers.DDPMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
        (diffusers.DDPMScheduler(variance_type="learned"), "variance_type"),
        (diffusers.DDPMScheduler(beta_schedule="laplace"), "beta_schedule: expected one of linear"),
        (
            diffusers.EulerDiscreteScheduler(
                timestep_type="continuous", prediction_type="v_prediction"
            ),
            "timestep_type",
        ),
    ],
)
def test_what_is_not_understood(scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(unet(), scheduler)


def test_wrong_objects() -> None:
    with pytest.raises(TypeError, match="unet: expected a network of diffusers, got Linear"):
        wrap(nn.Linear(1, 1), diffusers.DDPMScheduler())
    with pytest.raises(TypeError, match="scheduler: expected a scheduler of diffusers, got str"):
        wrap(unet(), "ddpm")
    with pytest.raises(ValueError, match="out_channels: expected 3 for in_channels = 3"):
        wrap(unet(in_channels=3), diffusers.DDPMScheduler())


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_wrong_files(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    config = folder / "unet" / "config.json"
    schedule = folder / "scheduler" / "scheduler_config.json"
    whole, text, plan = weights.read_bytes(), config.read_text(), schedule.read_text()

    def refused(message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            load(folder)
        weights.write_bytes(whole)
        config.write_text(text)
        schedule.write_text(plan)

    for size in (0, 7, 200, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused("cannot load .*diffusion_pytorch_model.*no safetensors file or is cut off")
    edit(config, _class_name="UNet2DConditionModel")
    refused("config.json.*'UNet2DConditionModel', expected a 'UNet2DModel'")
    edit(config, block_out_channels=[8, 1_000_000])
    refused("config.json.*a tensor of 9000000000000 elements")
    edit(config, layers_per_block=10**9)
    refused("config.json.*layers_per_block")
    edit(config, layers_per_block=40)
    refused("config.json.*weights or more")
    edit(config, layers_per_block=10**5)
    refused("config.json.*200000 blocks")
    edit(config, time_embedding_dim=1e200)
    refused("config.json.*out of range")
    edit(config, in_channels=2, out_channels=2)
    refused("cannot load .*unet")
    edit(config, act_fn="__import__('os')")
    refused("cannot load .*unet")
    edit(schedule, beta_start=None)
    refused(r"scheduler_config.json.*beta_start: expected a number")
    edit(schedule, beta_end=10**400)
    refused("scheduler_config.json.*too large")
    edit(schedule, num_train_timesteps=10**12)
    refused("num_train_timesteps")
    edit(schedule, trained_betas="evil")
    refused("scheduler_config.json")
    schedule.write_text("{")
    refused("scheduler_config.json.*not JSON")
    schedule.write_text("[" * 100_000)
    refused("scheduler_config.json.*not JSON")
    schedule.unlink()
    refused("scheduler_config.json.*does not exist", FileNotFoundError)
    weights.rename(weights.with_suffix(".bin"))
    refused("only safetensors are read")
    weights.with_suffix(".bin").unlink()
    weights.unlink()
    refused("there is no diffusion_pytorch_model.safetensors in", FileNotFoundError)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nothing" / "there")
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(ValueError, match="expected the folder"):
        load(tmp_path / "file.json")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)


def test_repositories(monkeypatch: pytest.MonkeyPatch, pipeline: Path) -> None:
    asked = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        if name == "nobody/nothing":
            raise OSError("404")
        return str(pipeline)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load("google/ddpm-cifar10-32").sample_shape == (1, 8, 8)
    assert [name for name, _ in asked] == ["google/ddpm-cifar10-32"]

    def wanted(file: str) -> bool:
        return any(fnmatch.fnmatchcase(file, pattern) for pattern in asked[0][1])

    for folder in ("", "unet/"):
        assert wanted(folder + "config.json")
        assert wanted(folder + "diffusion_pytorch_model.safetensors")
        assert wanted(folder + "diffusion_pytorch_model-00001-of-00002.safetensors")
        assert not wanted(folder + "diffusion_pytorch_model.bin")
        assert not wanted(folder + "diffusion_pytorch_model.fp16.safetensors")
    assert not wanted("vqvae/diffusion_pytorch_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing.*404"):
        load("nobody/nothing")


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch, pipeline: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'sbm_fast\[diffusers\]'"):
        load(pipeline)
