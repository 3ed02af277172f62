"""Drift and divergence of the probability flow on every backend."""

import itertools
from dataclasses import replace

import flow_cases as cases
import noise_cases
import pytest
import torch
from op_backends import BACKENDS, TWINLESS, call, each_twinless, is_slow, over, parameters

from sbm_fast import _load, noise

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAN = float("nan")
SHAPES = [(23, 5), (21,), (7, 1), (5, 3, 7, 9), (3, 1023), (2, 1024), (3, 1025), (2, 4, 33, 41)]
FEW_SHAPES = [(3, 5), (4,), (2, 3, 7, 9), (2, 1024), (1, 4, 33, 41)]


@over("shape", SHAPES, FEW_SHAPES, TWINLESS)
@pytest.mark.parametrize("probes", [None, 1, 3, 8])
def test_the_formula(backend: str, shape: tuple[int, ...], probes: int | None) -> None:
    if is_slow(backend) and probes == 8:
        probes = 2
    kinds = [(F32, F32), (F32, F64), (F64, F64), (F64, F32)]
    for dtype, sums in kinds[:2] if is_slow(backend) else kinds:
        for gaussian in (False, True):
            case = cases.flow(shape, probes, dtype=dtype, sums=sums, gaussian=gaussian)
            assert cases.violation(case, cases.slope(case, backend)) == "", (dtype, sums)


@each_twinless
@pytest.mark.parametrize("net_dtype", [F32, F64, BF16, F16])
def test_dtypes_of_network_and_product(net_dtype: torch.dtype, backend: str) -> None:
    for dtype, sums, gaussian in itertools.product((F32, F64), (F32, F64), (False, True)):
        case = cases.flow(
            (3, 3, 5, 7), 2, dtype=dtype, net_dtype=net_dtype, sums=sums, gaussian=gaussian
        )
        assert cases.violation(case, cases.slope(case, backend)) == ""


@each_twinless
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("draw", [0, 5, 2**32 - 1])
def test_probes_are_those_of_the_noise_ops(draw: int, gaussian: bool, backend: str) -> None:
    """One sample a place: its product is 1 there and 0 elsewhere, so the sum is v there."""
    places = torch.tensor([0, 1, 2, 3, 4, 15, 16, 255, 1023, 1024, 1025, 2046])
    d, batch, count = 2050, len(places), 3
    key = noise.keys(7, 1)
    product = torch.zeros(batch, d)
    product[torch.arange(batch), places] = 1.0
    case = replace(
        cases.flow((batch, d), count),
        product=product.expand(count, batch, d).contiguous(),
        keys=key.repeat(batch),
        coef=torch.tensor([0.0, 1.0, 1.0], dtype=F64).expand(batch, 3),
        gaussian=gaussian,
        draw=draw,
    )
    divergence = cases.slope(case, backend)[1]
    assert divergence is not None
    for k in range(count):
        v = torch.empty(1, d)
        kind = "normal_" if gaussian else "rademacher_"
        call(backend, kind, v, key, (draw + k) % 2**32, noise.PROBE)
        assert torch.equal(divergence[k], v[0, places].double())


@each_twinless
def test_the_estimate_is_the_trace(backend: str) -> None:
    """Of a matrix, by its products with the probes: the mean over the probes, and for a diagonal
    matrix every single one."""
    d, count = 12, 256
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(d, d, generator=g, dtype=F64)
    case = cases.flow((1, d), count)
    v = cases.probes(case).double()
    case = replace(case, coef=torch.tensor([[0.0, 1.0, 1.0]], dtype=F64))
    for m in (matrix, torch.diag(torch.diag(matrix))):
        divergence = cases.slope(replace(case, product=v @ m), backend)[1]
        assert divergence is not None
        mixed = (m + m.T).fill_diagonal_(0).square().sum() / 2  # the variance of vᵀ m v
        error = float((divergence.mean() - torch.trace(m)).abs())
        assert error <= 5 * float(mixed / count) ** 0.5 + 1e-12
        if mixed == 0:
            torch.testing.assert_close(divergence, torch.trace(m).expand(count, 1))


@over("shape", [(8, 5), (3, 3, 21, 20)], [(8, 5)], TWINLESS)
def test_a_coefficient_of_0_does_not_read_its_source(backend: str, shape: tuple[int, ...]) -> None:
    case = cases.flow(shape, 2)
    case.coef[0, 0] = case.coef[1, 1] = case.coef[2, 0] = 0.0
    case.coef[2, 1] = 0.0
    clean = cases.slope(case, backend)
    case.x[[0, 2]] = NAN
    case.network[[1, 2]] = NAN
    assert cases.same(clean, cases.slope(case, backend))
    assert clean[0].isfinite().all() and (clean[0][2] == 0).all()


@each_twinless
def test_nan_and_infinity_stay_with_their_sample(backend: str) -> None:
    case = cases.flow((4, 3, 19, 20), 3)
    assert case.product is not None
    clean = cases.slope(case, backend)
    case.product[1, 2, 1, 3, 4] = NAN
    case.product[2, 0, 0, 0, 0] = float("inf")
    case.network[3, 2, 18, 19] = NAN
    drift, divergence = cases.slope(case, backend)
    assert divergence is not None and clean[1] is not None
    bad = ~divergence.isfinite()
    assert bad.nonzero().tolist() == [[1, 2], [2, 0]]
    assert torch.equal(divergence[~bad], clean[1][~bad])
    assert drift[3, 2, 18, 19].isnan() and int(drift.isnan().sum()) == 1


@each_twinless
def test_nothing_outside_the_outputs_is_written(backend: str) -> None:
    for numel in (129,) if is_slow(backend) else (1, 5, 63, 65, 1023, 1025):
        case = cases.flow((6, numel), 3)
        expected = cases.slope(case, backend)
        band = torch.full((8, numel + 40), NAN)
        sums = torch.full((3 * 6 + 40,), NAN, dtype=F64)
        drift, divergence = band[1:7, 20 : 20 + numel], sums[20:38].view(3, 6)
        call(
            backend, "hutchinson_", drift, divergence, case.x, case.network, case.product,
            case.keys, case.coef, case.draw, case.stream, False,
        )  # fmt: skip
        assert cases.same((drift, divergence), expected)
        drift.fill_(NAN)
        divergence.fill_(NAN)
        assert band.isnan().all() and sums.isnan().all()


@each_twinless
@pytest.mark.parametrize("shape", [(0, 3), (0,), (4, 0), (2, 3, 0)])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    for probes in (None, 0, 2):
        case = cases.flow(shape, probes)
        case.coef.fill_(NAN)
        drift, divergence = cases.slope(case, backend)
        assert drift.shape == shape
        assert divergence is None or (divergence == 0).all()


@each_twinless
def test_no_probes_leave_the_drift(backend: str) -> None:
    case = cases.flow((3, 5), 0)
    drift, divergence = cases.slope(case, backend)
    assert divergence is not None and divergence.shape == (0, 3)
    alone = cases.slope(replace(case, product=None), backend)
    assert torch.equal(drift, alone[0])


@each_twinless
def test_memory_formats_do_not_matter(backend: str) -> None:
    case = cases.flow((2 if is_slow(backend) else 9, 4, 17, 19), 2)
    plain = cases.slope(case, backend)
    assert case.product is not None
    last = torch.channels_last
    wide = torch.zeros(len(case.x), 6, dtype=F64)
    wide[:, ::2] = case.coef
    of_probes = case.product.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    apart = torch.stack([case.product, case.product], dim=2)[:, :, 1]
    for product in (of_probes, apart, case.product.transpose(0, 1).contiguous().transpose(0, 1)):
        other = replace(
            case,
            x=case.x.contiguous(memory_format=last),
            network=case.network.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
            product=product,
            coef=wide[:, ::2],
        )
        assert cases.same(plain, cases.slope(other, backend))
    assert cases.same(plain, cases.slope(replace(case, product=of_probes), backend))
    shared = replace(case, coef=case.coef[:1].expand_as(case.coef))
    kept = replace(shared, coef=shared.coef.contiguous())
    assert cases.same(cases.slope(shared, backend), cases.slope(kept, backend))


@over("shape", [(30, 3), (9, 257), (5, 2, 40, 33)], [(5, 3), (3, 2, 40, 33)], TWINLESS)
def test_threads_splits_and_permutations_do_not_matter(
    backend: str, shape: tuple[int, ...]
) -> None:
    case = cases.flow(shape, 3)
    whole = cases.slope(case, backend)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threaded = cases.slope(case, backend)
    torch.set_num_threads(before)
    assert cases.same(whole, threaded)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    for part in (order, order[:1], order[1:3]):
        drift, divergence = cases.slope(cases.picked(case, part), backend)
        assert whole[1] is not None and divergence is not None
        assert torch.equal(drift, whole[0][part]) and torch.equal(divergence, whole[1][:, part])


@each_twinless
def test_a_probe_does_not_depend_on_those_beside_it(backend: str) -> None:
    case = cases.flow((3, 40), 4)
    assert case.product is not None
    whole = cases.slope(case, backend)[1]
    later = replace(case, product=case.product[2:], draw=case.draw + 2)
    rest = cases.slope(later, backend)[1]
    assert whole is not None and rest is not None and torch.equal(whole[2:], rest)


@each_twinless
@pytest.mark.parametrize("source", ["x", "network"])
def test_the_drift_may_take_the_place_of_what_it_is_made_of(source: str, backend: str) -> None:
    case = cases.flow((5, 3, 4, 6), 1)
    expected = cases.slope(case, backend)[0]
    drift = getattr(case, source).clone()
    given = {"x": case.x, "network": case.network, source: drift}
    call(
        backend, "hutchinson_", drift, None, given["x"], given["network"], None, case.keys,
        case.coef, 0, 2, False,
    )  # fmt: skip
    assert torch.equal(drift, expected)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled part")
@pytest.mark.parametrize(
    "backend", [parameters(name) for name in TWINLESS if name not in ("cpu", "eager")]
)
@pytest.mark.parametrize("sums", [F32, F64])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 19, 31), (2, 5, 31, 29)])
def test_kernels_give_the_bits_of_the_cpu(
    shape: tuple[int, ...], dtype: torch.dtype, sums: torch.dtype, backend: str
) -> None:
    for gaussian, net_dtype in ((False, F32), (True, F64), (True, BF16)):
        case = cases.flow(
            shape, 2, dtype=dtype, net_dtype=net_dtype, sums=sums, gaussian=gaussian, seed=5
        )
        assert cases.same(cases.slope(case, "cpu"), cases.slope(case, backend))


@pytest.mark.parametrize("backend", [name for name in TWINLESS if BACKENDS[name].device == "cpu"])
def test_probes_beyond_two_to_the_31_elements(backend: str) -> None:
    case = cases.flow((1, 70), 2, net_dtype=BF16)
    assert case.product is not None
    far = replace(case, product=cases.far_apart(case.product))
    assert cases.same(cases.slope(case, backend), cases.slope(far, backend))


LEVEL_CODE = """
import hashlib, torch
import flow_cases as cases
from sbm_fast import _load
assert _load.load(), _load.REASON
print(_load.host.cpu_level())
F32, F64 = torch.float32, torch.float64
for dtype in (F32, F64):
    digest = hashlib.sha256()
    for shape in ((33, 1), (33, 7), (9, 64), (9, 65), (3, 1023), (3, 1024), (2, 4099)):
        for net_dtype in (F32, F64, torch.bfloat16, torch.float16):
            for sums in (F32, F64):
                for gaussian in (False, True):
                    case = cases.flow(shape, 2, dtype=dtype, net_dtype=net_dtype, sums=sums,
                                      gaussian=gaussian)
                    for out in cases.slope(case, "cpu"):
                        digest.update(out.numpy().tobytes())
        digest.update(cases.norm(cases.error(shape, dtype=dtype), "cpu").numpy().tobytes())
    print(dtype, digest.hexdigest())
"""


@pytest.mark.skipif(not _load.COMPILED, reason=_load.REASON)
def test_instruction_sets_give_the_same_bits() -> None:
    """Of this op and of `error_norm_`."""
    outputs = noise_cases.by_instruction_set(LEVEL_CODE)
    assert "portable" in outputs
    assert len(set(outputs.values())) == 1, outputs
