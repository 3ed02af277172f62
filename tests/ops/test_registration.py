"""The ops as torch sees them: schemas, fakes, compilation, checks, and life without the library."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flow_cases
import noise_cases
import op_cases as cases
import pytest
import torch
from op_backends import call, either, needs_compiled, needs_triton
from torch import Tensor

from sbm_fast import _load, noise
from sbm_fast.ops import affine_step, error_norm, hutchinson, langevin_epsilon
from sbm_fast.ops import noise as noise_ops
from sbm_fast.ops._library import SCHEMAS, WITHOUT_TWIN

OPS = torch.ops.sbm_fast
NAMES = ("x", "network", "uncond", "guidance", "registers", "keys", "row", "coef", "field")
STEP = (*NAMES, "epsilon", "noise", "net_input", "net_time", "first_bad")


def step_arguments(case: cases.Case) -> dict[str, Any]:
    batch, dtype = len(case.x), case.x.dtype
    given = {name: getattr(case, name) for name in NAMES}
    return given | {
        "epsilon": torch.zeros(batch, dtype=dtype),
        "noise": case.noise,
        "net_input": torch.zeros_like(case.x, dtype=case.net_dtype),
        "net_time": torch.zeros(batch, dtype=dtype),
        "first_bad": case.first_bad,
    }


def test_every_op_is_registered() -> None:
    expected = {"normal_", "uniform_", "rademacher_", "words_", "keys_"}
    expected |= {"affine_step_", "langevin_epsilon_", "hutchinson_", "error_norm_"}
    expected |= {"group_norm_silu_", "group_norm_silu_product_"}
    expected |= {"winograd_input_", "winograd_output_"}
    assert set(SCHEMAS) == expected


def test_every_op_takes_cuda_tensors() -> None:
    """Those without a CUDA kernel by Triton's, whether or not others have one."""
    norms = ["group_norm_silu_", "group_norm_silu_product_"]
    assert sorted(WITHOUT_TWIN) == ["error_norm_", *norms, "hutchinson_"]
    for name in SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sbm_fast::{name}", "CUDA"), name


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_schemas_of_cpp_and_python_are_one(name: str) -> None:
    assert str(getattr(OPS, name).default._schema) == SCHEMAS[name]


@pytest.mark.parametrize("kind", ["normal", "uniform", "rademacher", "words"])
def test_opcheck_noise(kind: str) -> None:
    dtype = torch.int32 if kind == "words" else torch.float32
    for shape in ((3, 5), (2, 3, 4, 4), (0, 2)):
        arguments = (torch.zeros(shape, dtype=dtype), noise.keys(0, shape[0]), 1, 2)
        torch.library.opcheck(noise_ops.OPS[kind], arguments)


def test_opcheck_keys() -> None:
    torch.library.opcheck(noise_ops.keys_, (torch.zeros(4, dtype=torch.int64), 3, 1))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_step(dtype: torch.dtype, guided: bool) -> None:
    case = cases.make((10, 3, 4), dtype=dtype, guided=guided, explicit=guided)
    arguments = step_arguments(case)
    torch.library.opcheck(affine_step.affine_step_, tuple(arguments[n] for n in STEP))
    start = cases.make((2, 3), [0, 0], dtype=dtype)
    plain = step_arguments(start) | dict.fromkeys(
        ("network", "epsilon", "net_input", "net_time", "first_bad")
    )
    torch.library.opcheck(affine_step.affine_step_, tuple(plain[n] for n in STEP))


def test_opcheck_epsilon() -> None:
    a = step_arguments(cases.make((10, 3, 4)))
    first = (a["epsilon"], a["x"], a["network"], a["uncond"], a["guidance"])
    rest = (a["keys"], a["row"], a["coef"], a["field"], a["noise"])
    torch.library.opcheck(langevin_epsilon.langevin_epsilon_, first + rest)


SLOPE = ("drift", "divergence", "x", "network", "product", "keys", "coef", "draw", "stream",
         "gaussian")  # fmt: skip
ERROR = ("out", "x", "registers", "weights", "atol", "rtol")


def slope_arguments(case: flow_cases.Flow) -> dict[str, Any]:
    given = {name: getattr(case, name) for name in SLOPE[2:]}
    shape = None if case.product is None else (len(case.product), len(case.x))
    divergence = None if shape is None else torch.zeros(shape, dtype=case.sums)
    return {"drift": torch.zeros_like(case.x), "divergence": divergence} | given


def error_arguments(case: flow_cases.Error) -> dict[str, Any]:
    given = {name: getattr(case, name) for name in ERROR[1:]}
    return {"out": torch.zeros(len(case.x), dtype=case.x.dtype)} | given


@pytest.mark.parametrize("probes", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_hutchinson(dtype: torch.dtype, probes: int | None) -> None:
    given = slope_arguments(flow_cases.flow((3, 2, 4), probes, dtype=dtype))
    torch.library.opcheck(hutchinson.hutchinson_, tuple(given.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_error_norm(dtype: torch.dtype) -> None:
    given = error_arguments(flow_cases.error((3, 2, 4), dtype=dtype))
    torch.library.opcheck(error_norm.error_norm_, tuple(given.values()))


@pytest.mark.parametrize("side", [2, 4])
def test_opcheck_winograd(side: int) -> None:
    x = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last)
    tiles = torch.zeros((side + 2) ** 2, 2, 5)
    torch.library.opcheck(OPS.winograd_input_, (tiles, x, 0))
    for bias, plus in ((None, None), (torch.ones(5), torch.ones_like(x))):
        torch.library.opcheck(OPS.winograd_output_, (x.clone(), tiles, bias, plus, 0, 0.7))


def a_row(case: cases.Case) -> Callable[[Tensor, Tensor], Tensor]:
    arguments = step_arguments(case)

    def function(x: Tensor, network: Tensor) -> Tensor:
        z = torch.empty_like(x)
        OPS.normal_(z, arguments["keys"], 3, 1)
        state = x + 0.1 * z
        given = arguments | {"x": state, "network": torch.tanh(network)}
        OPS.affine_step_(*(given[n] for n in STEP))
        return state * 2.0

    return function


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_a_full_graph(backend: str) -> None:
    torch._dynamo.reset()
    case = cases.make((10, 6))
    assert case.network is not None
    expected = a_row(replace(case, registers=case.registers.clone()))(case.x, case.network)
    compiled = torch.compile(a_row(case), fullgraph=True, backend=backend)
    got = compiled(case.x, case.network)
    if backend == "aot_eager":
        assert torch.equal(got, expected)
    # Inductor rounds the operations around the ops in its own way.
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_step_of_the_flow_compiles_as_a_full_graph(backend: str) -> None:
    torch._dynamo.reset()
    case, of_error = flow_cases.flow((5, 6), 2), flow_cases.error((5, 6), 3)

    def function(x: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = slope_arguments(replace(case, x=x, product=2 * product))
        OPS.hutchinson_(*(given[n] for n in SLOPE))
        at = error_arguments(replace(of_error, x=x + 0.1 * given["drift"]))
        OPS.error_norm_(*(at[n] for n in ERROR))
        return given["drift"], given["divergence"] + 1, at["out"]

    assert case.product is not None
    expected = function(case.x, case.product)
    got = torch.compile(function, fullgraph=True, backend=backend)(case.x, case.product)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_fakes_take_cuda_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(3, 5, device="cuda")
        registers = torch.empty(2, 3, 5, device="cuda")
        weights = torch.empty(3, 3, dtype=torch.float64, device="cuda")
        keys = torch.empty(3, dtype=torch.int64, device="cuda")
        sums = torch.empty(2, 3, device="cuda")
        OPS.hutchinson_(torch.empty_like(x), sums, x, x, registers, keys, weights, 0, 2, False)
        OPS.error_norm_(torch.empty(3, device="cuda"), x, registers, weights, 1e-3, 1e-3)
        out = torch.empty(3, 5, device="cuda")
        OPS.normal_(out, torch.empty(3, dtype=torch.int64, device="cuda"), 0, 1)
        assert out.shape == (3, 5)


WITHOUT = """
import json, torch
from dataclasses import replace
import op_cases as cases
from sbm_fast import _load, noise
from op_backends import BACKENDS
assert not _load.COMPILED and "cpu" not in BACKENDS, _load.REASON
BACKENDS["op"] = replace(BACKENDS["eager"], ops=torch.ops.sbm_fast)
out = torch.empty(3, 41)
torch.ops.sbm_fast.normal_(out, noise.keys(5, 3), 2, 1)
state = cases.make((20, 7), guided=True)
got = cases.run(state, "op")
words = torch.empty(3, 9, dtype=torch.int32)
torch.ops.sbm_fast.words_(words, noise.keys(5, 3), 2, 1)
import flow_cases
drift, divergence = flow_cases.slope(flow_cases.flow((3, 7), 2), "op")
error = flow_cases.norm(flow_cases.error((3, 7)), "op")
print(json.dumps({"normal": out.tolist(), "x": got["x"].tolist(), "words": words.tolist(),
                  "flow": [drift.tolist(), divergence.tolist(), error.tolist()],
                  "ops": sorted(n for n in dir(torch.ops.sbm_fast) if n.endswith("_"))}))
"""


def test_ops_exist_without_the_compiled_part() -> None:
    found = json.loads(noise_cases.run_python(WITHOUT, SBM_FAST_DISABLE_COMPILED="1"))
    here = noise.normal(5, (3, 41), draw=2)
    torch.testing.assert_close(torch.tensor(found["normal"]), here, rtol=0, atol=2e-6)
    words = torch.empty(3, 9, dtype=torch.int32)
    OPS.words_(words, noise.keys(5, 3), 2, 1)
    assert found["words"] == words.tolist()
    mine = cases.run(cases.make((20, 7), guided=True), "cpu" if _load.COMPILED else "eager")["x"]
    torch.testing.assert_close(torch.tensor(found["x"]), mine, rtol=2e-6, atol=1e-5)
    backend = "cpu" if _load.COMPILED else "eager"
    error = flow_cases.norm(flow_cases.error((3, 7)), backend)
    slope = flow_cases.slope(flow_cases.flow((3, 7), 2), backend)
    for got, expected in zip(found["flow"], (*slope, error), strict=True):
        assert expected is not None
        got = torch.tensor(got, dtype=expected.dtype)
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-5)


LONG = torch.zeros(4, dtype=torch.int64)
F32 = torch.zeros(4)
BAD_STEP: list[tuple[str, str, dict[str, Any]]] = [
    ("x", "float32 or float64", {"x": torch.zeros(4, 6, dtype=torch.int32)}),
    ("x", "float32 or float64", {"x": torch.zeros(4, 6, dtype=torch.bfloat16)}),
    ("x", "got a scalar", {"x": torch.zeros(())}),
    ("network", "shape of x", {"network": torch.zeros(4, 5)}),
    ("network", "shape of x", {"network": torch.zeros(4, 6, 1)}),
    ("network", "expected float32, float64", {"network": torch.zeros(4, 6, dtype=torch.int64)}),
    ("network", "needs it", {"network": None}),
    ("uncond", "shape of x", {"uncond": torch.zeros(1, 6), "guidance": F32}),
    ("uncond", "needs network and guidance", {"uncond": torch.zeros(4, 6)}),
    ("guidance", "vector of 4 samples", {"guidance": torch.zeros(3)}),
    ("guidance", "vector of 4 samples", {"guidance": F32.double()}),
    ("guidance", "contiguous", {"guidance": torch.zeros(8)[::2]}),
    ("registers", r"\[2, \*x.shape\]", {"registers": None}),
    ("registers", r"\[2, \*x.shape\]", {"registers": torch.zeros(1, 4, 6)}),
    ("registers", r"\[2, \*x.shape\]", {"registers": torch.zeros(2, 4, 5)}),
    ("registers", r"\[2, \*x.shape\]", {"registers": torch.zeros(2, 3, 6)}),
    ("registers", "dtype of x", {"registers": torch.zeros(2, 4, 6).double()}),
    ("keys", "vector of 4 samples", {"keys": LONG.int()}),
    ("keys", "vector of 4 samples", {"keys": LONG[:3]}),
    ("row", "vector of 4 samples", {"row": LONG}),
    ("coef", "contiguous CPU tensor", {"coef": torch.zeros(8, 21)}),
    ("coef", "of x's dtype", {"coef": torch.zeros(8, 2, 21).double()}),
    ("coef", "no plan has 20 lanes", {"coef": torch.zeros(8, 2, 20)}),
    ("field", "int32 CPU tensor", {"field": torch.zeros(8, 4)}),
    ("field", "int32 CPU tensor", {"field": torch.zeros(7, 4, dtype=torch.int32)}),
    ("epsilon", "needs it", {"epsilon": None, "row": torch.full((4,), 5, dtype=torch.int32)}),
    ("epsilon", "vector of 4 samples", {"epsilon": torch.zeros(5)}),
    ("noise", "shape of x", {"noise": torch.zeros(4)}),
    ("net_input", "shape of x", {"net_input": torch.zeros(4, 7)}),
    ("net_time", "vector of 4 samples", {"net_time": F32.bfloat16()}),
    ("first_bad", "vector of 4 samples", {"first_bad": LONG}),
]


@needs_compiled
@pytest.mark.parametrize(("name", "message", "change"), BAD_STEP)
def test_the_step_names_what_is_wrong(name: str, message: str, change: dict[str, Any]) -> None:
    arguments = step_arguments(cases.make((4, 6), [1, 1, 1, 1])) | change
    with pytest.raises(RuntimeError, match=rf"{name}: .*{message}"):
        affine_step.affine_step_(*(arguments[n] for n in STEP))


@needs_triton
@pytest.mark.parametrize(
    ("name", "message", "change"),
    [bad for bad in BAD_STEP if bad[1] != "needs it"],  # rows are the GPU's to read
)
def test_the_triton_step_names_what_is_wrong(
    name: str, message: str, change: dict[str, Any]
) -> None:
    arguments = step_arguments(cases.make((4, 6), [1, 1, 1, 1])) | change
    with pytest.raises(RuntimeError, match=rf"{name}: .*{message.replace('CPU ', '')}"):
        call("triton", "affine_step_", *(arguments[n] for n in STEP))


@either
def test_views_of_what_the_step_writes_are_refused(backend: str) -> None:
    case = cases.make((4, 6, 6), [1, 1, 1, 1])
    for x in (case.x, case.x.double()):
        arguments = step_arguments(replace(case, x=x, registers=case.registers.to(x.dtype)))
        net_input = torch.zeros(4, 6, 6)
        views = (x.transpose(1, 2), x[-1:].expand(4, 6, 6))
        for network in (*views, net_input.transpose(1, 2)):
            given = arguments | {"network": network, "net_input": net_input}
            with pytest.raises(RuntimeError, match="network: is another view of"):
                call(backend, "affine_step_", *(given[n] for n in STEP))


@either
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(()), LONG, 0, 0), "out: .*scalar"),
        ((torch.zeros(4, 2, dtype=torch.int32), LONG, 0, 0), "out: .*float32, float64"),
        ((torch.zeros(4, 2), LONG[:2], 0, 0), "keys: .*4 samples"),
        ((torch.zeros(4, 2), LONG.int(), 0, 0), "keys: .*4 samples"),
    ],
)
def test_noise_ops_name_what_is_wrong(
    backend: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(backend, "normal_", *arguments)
    with pytest.raises(RuntimeError, match="out: "):
        call(backend, "words_", torch.zeros(4, 2), LONG, 0, 0)
    with pytest.raises(RuntimeError, match="out: "):
        call(backend, "keys_", torch.zeros(4), 0, 0)


D = torch.float64
BAD_SLOPE: list[tuple[str, str, dict[str, Any]]] = [
    ("x", "float32 or float64", {"x": torch.zeros(4, 6, dtype=torch.bfloat16)}),
    ("x", "got a scalar", {"x": torch.zeros(())}),
    ("drift", "shape of x", {"drift": torch.zeros(4, 5)}),
    ("drift", "dtype of x", {"drift": torch.zeros(4, 6, dtype=D)}),
    ("network", "shape of x", {"network": torch.zeros(4, 6, 1)}),
    ("network", "expected float32, float64", {"network": torch.zeros(4, 6, dtype=torch.int64)}),
    ("keys", "vector of 4 samples", {"keys": LONG[:3]}),
    ("keys", "contiguous", {"keys": torch.zeros(8, dtype=torch.int64)[::2]}),
    ("coef", r"float64 CPU tensor \[4, 3\]", {"coef": torch.zeros(4, 3)}),
    ("coef", r"float64 CPU tensor \[4, 3\]", {"coef": torch.zeros(3, 3, dtype=D)}),
    ("coef", r"float64 CPU tensor \[4, 3\]", {"coef": torch.zeros(4, 2, dtype=D)}),
    ("product", "with divergence, and only then", {"product": None}),
    ("product", "with divergence, and only then", {"divergence": None}),
    ("product", r"\[count, \*x.shape\]", {"product": torch.zeros(2, 4, 5)}),
    ("product", r"\[count, \*x.shape\]", {"product": torch.zeros(4, 6)}),
    ("product", "expected float32, float64", {"product": torch.zeros(2, 4, 6).int()}),
    ("divergence", r"CPU tensor \[2, 4\]", {"divergence": torch.zeros(1, 4)}),
    ("divergence", r"CPU tensor \[2, 4\]", {"divergence": torch.zeros(4, 2).T}),
    ("divergence", r"float32 or float64", {"divergence": torch.zeros(2, 4).half()}),
]
BAD_ERROR: list[tuple[str, str, dict[str, Any]]] = [
    ("x", "float32 or float64", {"x": torch.zeros(4, 6, dtype=torch.float16)}),
    ("out", "vector of 4 samples", {"out": torch.zeros(3)}),
    ("out", "vector of 4 samples", {"out": torch.zeros(4, dtype=D)}),
    ("out", "contiguous", {"out": torch.zeros(8)[::2]}),
    ("registers", r"\[count, \*x.shape\]", {"registers": torch.zeros(3, 4, 5)}),
    ("registers", "dtype of x", {"registers": torch.zeros(3, 4, 6, dtype=D)}),
    ("registers", "got none", {"registers": torch.zeros(0, 4, 6)}),
    ("weights", r"float64 CPU tensor \[4, 3\]", {"weights": torch.zeros(4, 3)}),
    ("weights", r"float64 CPU tensor \[4, 3\]", {"weights": torch.zeros(4, 2, dtype=D)}),
]


@either
@pytest.mark.parametrize(("name", "message", "change"), BAD_SLOPE)
def test_hutchinson_names_what_is_wrong(
    name: str, message: str, change: dict[str, Any], backend: str
) -> None:
    given = slope_arguments(flow_cases.flow((4, 6), 2)) | change
    message = message if backend == "cpu" else message.replace("CPU ", "")
    with pytest.raises(RuntimeError, match=rf"{name}: .*{message}"):
        call(backend, "hutchinson_", *(given[n] for n in SLOPE))


@either
@pytest.mark.parametrize(("name", "message", "change"), BAD_ERROR)
def test_error_norm_names_what_is_wrong(
    name: str, message: str, change: dict[str, Any], backend: str
) -> None:
    given = error_arguments(flow_cases.error((4, 6), 3)) | change
    message = message if backend == "cpu" else message.replace("CPU ", "")
    with pytest.raises(RuntimeError, match=rf"{name}: .*{message}"):
        call(backend, "error_norm_", *(given[n] for n in ERROR))


@either
def test_memory_that_the_drift_would_overwrite_is_refused(backend: str) -> None:
    given = slope_arguments(flow_cases.flow((4, 6, 6), 2))
    memory = torch.zeros(5, 4, 6, 6)
    views = {"x": memory[0].transpose(1, 2), "network": memory[0].transpose(1, 2)}
    views |= {"product": memory[:2]}
    for name, view in views.items():
        with pytest.raises(RuntimeError, match=f"{name}: .*drift"):
            call(backend, "hutchinson_", *(given | {"drift": memory[0], name: view}).values())
    given |= {"drift": memory[0], "product": memory[1:3], "x": memory[3], "network": memory[4]}
    call(backend, "hutchinson_", *given.values())
