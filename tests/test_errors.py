"""Every bad input of the public interface: its error names the argument."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import sampling_cases as cases
import torch
from torch import Tensor

from sbm_fast import NCSNLadder, Sampler, ScoreModel, noise, sample

NAN = float("nan")
KEYS = noise.keys(0, 4)
ARRAY = np.array([1, 2])
GUIDED = ScoreModel(lambda x, t, c=0: -x, null_cond={})
BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("model", TypeError, {"model": "unet.pt"}),
    ("model", TypeError, {"model": None}),
    ("sde", TypeError, {"sde": "vp"}),
    ("sde", TypeError, {"sde": None}),
    ("shape", ValueError, {"shape": None}),
    ("shape", ValueError, {"shape": ()}),
    ("shape", ValueError, {"shape": (-1, 6)}),
    ("shape", ValueError, {"shape": (4, 1.5)}),
    ("shape", TypeError, {"shape": 4}),
    ("shape", TypeError, {"shape": "ab"}),
    ("shape", ValueError, {"model": ScoreModel(cases.network, sample_shape=(5,))}),
    ("method", ValueError, {"method": "emm"}),
    ("method", ValueError, {"method": None}),
    ("steps", ValueError, {"steps": 0}),
    ("steps", ValueError, {"steps": -3}),
    ("steps", TypeError, {"steps": 2.5}),
    ("steps", TypeError, {"steps": "10"}),
    ("seed", TypeError, {"seed": 1.5}),
    ("seed", TypeError, {"seed": "0"}),
    ("seed", ValueError, {"seed": 2**64}),
    ("keys", ValueError, {"seed": 0, "keys": KEYS}),
    ("keys", ValueError, {"keys": KEYS, "first_sample": 1}),
    ("keys", ValueError, {"keys": KEYS[:3]}),
    ("keys", TypeError, {"keys": KEYS.int()}),
    ("keys", TypeError, {"keys": [1, 2, 3, 4]}),
    ("first_sample", ValueError, {"first_sample": -1}),
    ("first_sample", TypeError, {"first_sample": 1.0}),
    ("cond", TypeError, {"cond": torch.zeros(4)}),
    ("guidance", ValueError, {"guidance": 2.0}),
    ("guidance", ValueError, {"model": GUIDED, "guidance": torch.ones(3)}),
    ("guidance", ValueError, {"model": GUIDED, "guidance": torch.ones(4, 6)}),
    ("guidance", ValueError, {"model": GUIDED, "guidance": NAN}),
    ("guidance", TypeError, {"model": GUIDED, "guidance": "much"}),
    ("guidance", TypeError, {"model": GUIDED, "guidance": True}),
    ("guidance", TypeError, {"model": GUIDED, "guidance": torch.ones(4, dtype=torch.bool)}),
    ("guidance", TypeError, {"model": GUIDED, "guidance": 1j}),
    ("guidance", TypeError, {"model": GUIDED, "guidance": torch.ones(4) * 1j}),
    ("guidance", ValueError, {"model": GUIDED, "guidance": 10**400}),
    ("x_init", ValueError, {"x_init": torch.zeros(4, 5)}),
    ("x_init", ValueError, {"x_init": torch.zeros(6)}),
    ("x_init", ValueError, {"x_init": torch.full((4, 6), NAN)}),
    ("x_init", TypeError, {"x_init": torch.zeros(4, 6, dtype=torch.int64)}),
    ("x_init", TypeError, {"x_init": [[0.0] * 6] * 4}),
    ("t_max", ValueError, {"t_max": 1.5}),
    ("t_max", ValueError, {"t_max": 1e-6}),
    ("t_max", TypeError, {"t_max": "1"}),
    ("t_min", ValueError, {"t_min": -0.1}),
    ("t_min", ValueError, {"t_min": 2.0}),
    ("schedule", ValueError, {"schedule": "cosine"}),
    ("schedule", ValueError, {"schedule": [0.1, 0.5, 1.0]}),
    ("schedule", ValueError, {"schedule": [2.0, 1.0, 0.1]}),
    ("denoise", ValueError, {"denoise": "median"}),
    ("denoise", ValueError, {"denoise": True}),
    ("clip_denoised", ValueError, {"clip_denoised": 0.0}),
    ("clip_denoised", ValueError, {"clip_denoised": NAN}),
    ("clip_denoised", TypeError, {"clip_denoised": "1"}),
    ("noise", TypeError, {"noise": torch.zeros(4, 6)}),
    ("noise", ValueError, {"noise": lambda draw, stream: torch.zeros(4, 5)}),
    ("noise", ValueError, {"noise": lambda draw, stream: torch.zeros(4, 6).long()}),
    ("noise", ValueError, {"noise": lambda draw, stream: None}),
    ("compat", ValueError, {"compat": "diffusers"}),
    ("dtype", TypeError, {"dtype": torch.float16}),
    ("dtype", TypeError, {"dtype": "float32"}),
    ("net_dtype", TypeError, {"net_dtype": torch.int8}),
    ("net_dtype", TypeError, {"net_dtype": "bf16"}),
    ("net_dtype", TypeError, {"net_dtype": ARRAY}),
    ("backend", ValueError, {"backend": ARRAY}),
    ("compat", ValueError, {"compat": ARRAY}),
    ("denoise", ValueError, {"denoise": ARRAY}),
    ("num_samples", TypeError, {"shape": None, "num_samples": ARRAY}),
    ("shape", ValueError, {"shape": np.ones((2, 3), dtype=int)}),
    ("t_max", ValueError, {"t_max": 10**400}),
    ("steps", ValueError, {"steps": 10**400}),
    ("schedule", TypeError, {"schedule": object()}),
    ("schedule", TypeError, {"schedule": {}}),
    ("schedule", TypeError, {"schedule": 1 + 2j}),
    ("schedule", TypeError, {"schedule": ["a", "b"]}),
    ("schedule", TypeError, {"schedule": b"x"}),
    ("schedule", TypeError, {"schedule": [[1.0, 0.5], [0.2]]}),
    ("schedule", ValueError, {"schedule": 10**400}),
    ("device", ValueError, {"device": "tpu?"}),
    ("backend", ValueError, {"backend": "gpu"}),
    ("backend", ValueError, {"backend": "cuda"}),
    ("cuda_graph", ValueError, {"cuda_graph": True}),
    ("cuda_graph", ValueError, {"cuda_graph": "yes"}),
    ("callback", TypeError, {"callback": 3}),
    ("norm", ValueError, {"method": "pc", "norm": "batch_mean", "first_sample": 4}),
    ("norm", ValueError, {"method": "pc", "norm": "mean"}),
    ("snr", ValueError, {"method": "pc", "snr": -1.0}),
    ("corrector_steps", ValueError, {"method": "pc", "corrector_steps": -1}),
    ("predictor", ValueError, {"method": "pc", "predictor": "euler"}),
    ("corrector", ValueError, {"method": "pc", "corrector": "mala"}),
    ("solver", ValueError, {"method": "ode", "solver": "heun3"}),
    ("snrr", TypeError, {"method": "pc", "snrr": 0.1}),
    ("solver", TypeError, {"method": "em", "solver": "heun"}),
    ("model", ValueError, {"model": lambda x, t: x[:, :1]}),
    ("model", ValueError, {"model": lambda x, t: x.long()}),
    ("model", ValueError, {"model": lambda x, t: None}),
    ("model", ValueError, {"model": lambda x, t: (x, t)}),
    ("model", ValueError, {"model": lambda x, t: x.to("meta")}),
    ("model", ValueError, {"model": lambda x, t: x.mul_(-1.0)}),
]


@pytest.mark.parametrize(("name", "error", "arguments"), BAD)
def test_bad_input_is_named(name: str, error: type[Exception], arguments: dict[str, Any]) -> None:
    defaults = {"model": cases.network, "sde": cases.VP, "shape": (4, 6), "method": "em"}
    if "schedule" not in arguments:
        defaults["steps"] = 4
    given = {**defaults, **arguments}
    with pytest.raises(error, match=rf"^{name}\b.*: ") as caught:
        sample(given.pop("model"), given.pop("sde"), given.pop("shape"), **given)
    assert len(str(caught.value)) > len(name) + 15  # what was expected and what came


def test_unknown_options_and_methods_come_with_the_nearest_name() -> None:
    with pytest.raises(TypeError, match="did you mean 'corrector_steps'"):
        Sampler(cases.network, cases.VP, (4, 6), method="pc", corector_steps=2)
    with pytest.raises(ValueError, match="did you mean 'reverse_diffusion'"):
        Sampler(cases.network, cases.VP, (4, 6), method="reverse-diffusion")


def test_steps_beyond_a_ladder() -> None:
    with pytest.raises(ValueError, match=r"^steps: "):
        Sampler(cases.network, NCSNLadder([1.0, 0.1]), (4, 6), method="ancestral", steps=5)


def test_times_outside_the_training_of_the_network() -> None:
    model = ScoreModel(cases.network, sde=NCSNLadder([0.5, 0.1]), time="index")
    with pytest.raises(ValueError, match=r"^t: .*outside the range \[0.1, 0.5\]"):
        Sampler(model, cases.VP, (4, 6), method="em", steps=5)


def bad_at(samples: list[int], below: float, value: float) -> Callable[[Tensor, Tensor], Tensor]:
    def net(x: Tensor, t: Tensor) -> Tensor:
        out = -x
        if float(t[0]) <= below:
            out[samples, -1] = value
        return out

    return net


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_bad_network_values_are_reported_with_sample_step_and_time(
    value: float, backend: str
) -> None:
    sampler = Sampler(
        bad_at([2, 5], 0.7, value), cases.VP, (6, 40), method="em", steps=10, backend=backend
    )
    plan = sampler.plan
    row = next(r for r in range(1, plan.rows) if plan.time[r] <= 0.7)
    message = rf"for 2 of 6 samples, first for sample 2 at evaluation {row} of 10 \(row {row}, t = "
    with pytest.raises(ValueError, match=f"^model: .*{message}{plan.time[row]:.6g}"):
        sampler(seed=0)


@pytest.mark.parametrize("net_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bad_values_of_other_dtypes_are_seen(net_dtype: torch.dtype) -> None:
    for value in (NAN, float("inf")):
        net = bad_at([1], 1.0, value)
        with pytest.raises(ValueError, match="first for sample 1 at evaluation 1"):
            sample(lambda x, t, net=net: net(x, t).to(net_dtype), cases.VP, (3, 7), method="em",
                   steps=3, seed=0)  # fmt: skip


@pytest.mark.parametrize("method", ["pc", "ddim", "ode", "edm", "ald"])
def test_clamps_and_norms_do_not_hide_bad_values(method: str) -> None:
    options: dict[str, Any] = {"steps": 6, "clip_denoised": 1.0} if method == "ddim" else {}
    options = {"steps": 6, "norm": "sqrt_d"} if method == "pc" else options
    sde = cases.NCSN if method == "ald" else cases.VE
    with (
        pytest.warns(UserWarning, match="norm=") if method == "pc" else nullcontext(),
        pytest.raises(ValueError, match=r"^model: .*1 of 3 samples, first for sample 0"),
    ):
        sample(bad_at([0], 9.0, NAN), sde, (3, 7), method=method, seed=0, **options)


def state() -> dict[str, Tensor]:
    sampler = Sampler(cases.network, cases.VP, (4, 6), method="ode", steps=3)
    return sampler.start(seed=0).advance(2).state()


@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("state", ValueError, {"x": torch.zeros(4, 5)}),
        ("state", ValueError, {"row": torch.tensor(99)}),
        ("state", ValueError, {"row": torch.tensor(-1)}),
        ("state", ValueError, {"registers": torch.zeros(1)}),
        ("state", ValueError, {"first_bad": torch.zeros(3, dtype=torch.int32)}),
        ("state", ValueError, {"x": None}),
        ("keys", ValueError, {"keys": KEYS[:2]}),
        ("keys", TypeError, {"keys": KEYS.double()}),
    ],
)
def test_states_of_other_samplers_are_refused(
    name: str, error: type[Exception], change: Mapping[str, Tensor | None]
) -> None:
    sampler = Sampler(cases.network, cases.VP, (4, 6), method="ode", steps=3)
    given = {key: v for key, v in {**state(), **change}.items() if v is not None}
    with pytest.raises(error, match=f"^{name}: "):
        sampler.resume(given)


def test_state_must_be_a_mapping_and_rows_a_count() -> None:
    sampler = Sampler(cases.network, cases.VP, (4, 6), method="em", steps=3)
    with pytest.raises(TypeError, match=r"^state: "):
        sampler.resume(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^rows: "):
        sampler.start(seed=0).advance(-1)


def test_data_dependent_norms_warn_in_low_dimension() -> None:
    for norm in ("per_sample", "sqrt_d"):
        with pytest.warns(UserWarning, match=f"norm='{norm}' changes the law"):
            Sampler(cases.network, cases.VP, (4, 6), method="pc", steps=3, norm=norm)


def test_cancellation_warns_for_a_coarse_network() -> None:
    model = ScoreModel(cases.network, predicts="x0")
    with pytest.warns(UserWarning, match="cancels digits"):
        Sampler(model, cases.VP, (4, 6), method="em", steps=50, net_dtype=torch.bfloat16)


def test_arrays_are_no_names() -> None:
    names = np.array(["em", "ddim"])
    with pytest.raises(ValueError, match="method: unknown method"):
        Sampler(lambda x, t: -x, cases.VP, (2, 2), method=names)
    with pytest.raises(ValueError, match="variance: expected one of"):
        ScoreModel(lambda x, t: -x, variance=names)
