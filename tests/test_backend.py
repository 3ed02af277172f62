"""Which backend a name means, machine by machine, and what is said of those that are off."""

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import warnings
from collections.abc import Iterator

import noise_cases
import op_backends  # noqa: F401  # the interpreter as exact as a GPU
import pytest
import sampling_cases
import torch

from sbm_fast import _load, backend, kernels, noise
from sbm_fast.backend import choose_backend
from sbm_fast.doctor import backends
from sbm_fast.ops import _library, affine_step

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
DEVICE = "this torch, 2.99.0, was built without CUDA"


class Machine:
    """What this machine pretends to have."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        patch.setattr(backend, "_warned", False)
        self.has(compiled=True, cuda=False, device=False, triton="3.7.1", interpreted=False)

    def has(
        self, *, compiled: bool, cuda: bool, device: bool, triton: str, interpreted: bool
    ) -> None:
        class Host:
            @staticmethod
            def build_info() -> dict[str, bool]:
                return {"cuda": cuda}

        def find(name: str) -> importlib.machinery.ModuleSpec | None:
            return importlib.machinery.ModuleSpec(name, None) if triton else None

        set_to = self.patch.setattr
        set_to(_load, "COMPILED", compiled)
        set_to(_load, "REASON", "" if compiled else "nobody compiled it")
        set_to(_load, "host", Host if compiled else None)
        set_to(torch.cuda, "is_available", lambda: device)
        set_to(torch, "__version__", "2.99.0")
        set_to(torch.version, "cuda", "13.0" if device else None)
        set_to(importlib.util, "find_spec", find)
        set_to(importlib.metadata, "version", lambda name: triton)
        set_to(kernels, "interpreted", lambda: interpreted)
        _library.triton_missing.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch)
    monkeypatch.undo()
    _library.triton_missing.cache_clear()


GOOD = {"compiled": True, "cuda": True, "device": True, "triton": "3.7.1", "interpreted": False}


@pytest.mark.parametrize(
    ("name", "lacking", "reason"),
    [
        ("cpu", {"compiled": False}, "nobody compiled it"),
        ("cuda", {"compiled": False}, "nobody compiled it"),
        ("cuda", {"cuda": False}, "the compiled part has no CUDA kernels"),
        ("cuda", {"device": False}, DEVICE),
        ("triton", {"triton": ""}, "triton is not installed; to install it: pip install triton"),
        ("triton", {"triton": "3.2.0"}, "triton 3.2.0 is older than 3.6"),
        ("triton", {"device": False}, f"{DEVICE}, and TRITON_INTERPRET=1 is not set"),
    ],
)
def test_reasons(machine: Machine, name: str, lacking: dict[str, object], reason: str) -> None:
    machine.has(**GOOD)
    assert set(backends().values()) == {""}
    machine.has(**GOOD | lacking)
    assert backends()[name].startswith(reason)
    device = CPU if name == "cpu" else CUDA
    with pytest.raises(ValueError, match=f"^backend: '{name}' is off: {reason}"):
        choose_backend(name, device)


def test_no_device_for_a_torch_with_cuda(machine: Machine) -> None:
    machine.has(**GOOD | {"device": False})
    machine.patch.setattr(torch.version, "cuda", "13.0")
    assert backends()["cuda"] == "torch finds no CUDA device"


def test_installed_packages_are_not_looked_through_at_every_choice(machine: Machine) -> None:
    machine.has(**GOOD)
    choose_backend("triton", CUDA)

    def refuse(name: str) -> str:
        raise AssertionError("half a millisecond, before a kernel of 0.2 ms")

    machine.patch.setattr(importlib.metadata, "version", refuse)
    assert choose_backend("triton", CUDA).name == "triton"


def test_the_interpreter_needs_no_device(machine: Machine) -> None:
    machine.has(**GOOD | {"device": False, "interpreted": True})
    assert backends()["triton"] == ""
    machine.has(**GOOD | {"triton": "", "interpreted": True})
    assert backends()["triton"].startswith("triton is not installed")


@pytest.mark.parametrize(
    ("has", "device", "expected"),
    [
        ({}, CUDA, "cuda"),
        ({}, CPU, "cpu"),
        ({"cuda": False}, CUDA, "triton"),
        ({"compiled": False}, CUDA, "triton"),
        ({"interpreted": True}, CPU, "cpu"),
        ({}, META, "eager"),
    ],
)
def test_auto_is_the_best_that_works(
    machine: Machine, has: dict[str, object], device: torch.device, expected: str
) -> None:
    machine.has(**GOOD | has)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = choose_backend("auto", device)
    assert chosen.name == expected
    ops = {"triton": getattr(kernels, "affine_step_", None), "eager": affine_step.reference}
    assert chosen.affine_step_ is ops.get(expected, affine_step.affine_step_)


def test_auto_falls_back_to_torch_with_one_warning(machine: Machine) -> None:
    machine.has(**GOOD | {"cuda": False, "triton": ""})
    with pytest.warns(RuntimeWarning) as warned:
        assert choose_backend("auto", CUDA).name == "eager"
    assert choose_backend("auto", CUDA).name == "eager"
    assert len(warned) == 1
    for part in ("on cuda:0", "no CUDA kernels", "triton is not installed"):
        assert part in str(warned[0].message)


def test_names_need_their_device(machine: Machine) -> None:
    machine.has(**GOOD)
    for name, device in (("cuda", CPU), ("cpu", CUDA), ("cpu", META), ("triton", META)):
        with pytest.raises(ValueError, match=f"^backend: '{name}' is off: the run is on {device}"):
            choose_backend(name, device)
    with pytest.raises(ValueError, match="runs only in its interpreter, with TRITON_INTERPRET=1"):
        choose_backend("triton", CPU)
    for name in ("gpu", "", "CUDA", "Auto"):
        with pytest.raises(ValueError, match=r"^backend: expected one of \('auto', 'cuda', .*got"):
            choose_backend(name, CPU)
    for device in (CPU, CUDA, META):
        assert choose_backend("eager", device).name == "eager"


def test_noise_takes_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = noise.normal(3, (2, 5), backend="eager")
    for name, off in backends().items():
        if off or (name == "triton" and torch.cuda.is_available()):
            with pytest.raises(ValueError, match=f"^backend: '{name}' is off: "):
                noise.normal(3, (2, 5), backend=name)
        elif name != "cuda":
            torch.testing.assert_close(noise.normal(3, (2, 5), backend=name), plain)
    called = []
    monkeypatch.setitem(vars(kernels), "normal_", lambda *given: called.append(given))
    monkeypatch.setattr(kernels, "interpreted", lambda: True)
    if not backends()["triton"]:
        noise.normal(3, (2, 5), backend="triton")
        assert len(called) == 1
    with pytest.raises(ValueError, match=r"^backend: expected one of"):
        noise.uniform(3, (2, 5), backend="gpu")


@pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON)
@pytest.mark.skipif(bool(backends()["triton"]), reason=backends()["triton"])
@pytest.mark.parametrize("name", ["em", "pc batch mean", "pc per sample", "2m sde clipped"])
def test_a_run_on_triton_has_the_bits_of_the_compiled_one(name: str) -> None:
    """The network too is made of exactly rounded operations."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = [
        sampling_cases.sampler(name, (2, 5), backend=b, device=d)(seed=4).cpu()
        for b, d in (("cpu", "cpu"), ("triton", device))
    ]
    assert torch.equal(*runs)


ON_CUDA_TENSORS = """
import json, torch
from sbm_fast.ops import _library
from sbm_fast import _load, kernels, noise
chosen = {}
for name in _library.SCHEMAS:
    op = getattr(torch.ops.sbm_fast, name).default
    chosen[name] = op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA)
called = []
kernels.normal_ = lambda *arguments: called.append(len(arguments))
_library._triton_op("normal_")(torch.empty(2, 3), noise.keys(0, 2), 1, 1)
print(json.dumps([_load.COMPILED, _library.ON_CUDA, chosen, called]))
"""


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_ops_of_cuda_tensors_have_kernels(disabled: str) -> None:
    """Compiled with CUDA, or Triton's, or the reference; never none at all."""
    printed = noise_cases.run_python(ON_CUDA_TENSORS, SBM_FAST_DISABLE_COMPILED=disabled)
    compiled, on_cuda, chosen, called = json.loads(printed)
    assert set(chosen) == set(_library.SCHEMAS) and all(chosen.values())
    assert called == [4]
    if not compiled:
        assert on_cuda == ("" if _library.triton_missing() else "triton")


WITHOUT_TRITON = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch, sbm_fast
from sbm_fast import kernels, noise
from sbm_fast.ops import _library
assert _library.ON_CUDA in ("", "cuda") and not hasattr(kernels, "no_op")
assert noise.normal(0, (2, 3)).shape == (2, 3)
print(sbm_fast.doctor().backends["triton"])
"""


def test_everything_else_works_without_triton() -> None:
    printed = noise_cases.run_python(WITHOUT_TRITON)
    assert printed.startswith("triton is not installed")
