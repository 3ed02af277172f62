"""Bits per dimension of real digits: the estimated trace agrees with the exact one."""

import pytest

import sbm_fast
from sbm_fast.data import digits
from sbm_fast.nn import shipped


@pytest.mark.slow
def test_estimated_and_exact_traces_agree() -> None:
    """On the same dequantised digits; all held-out digits are in docs/likelihood.md."""
    x, network = digits().held_out[:4], shipped.digits()
    options = {"levels": 17, "seed": 0, "rtol": 1e-3, "atol": 1e-3}
    estimated = sbm_fast.bits_per_dim(
        network, sbm_fast.VPSDE(), x, probes=8, exact=False, **options
    )
    exact = sbm_fast.bits_per_dim(network, sbm_fast.VPSDE(), x, exact=True, **options)
    assert (exact.stderr == 0).all()
    off = (estimated.bits_per_dim - exact.bits_per_dim) / estimated.stderr
    # Student's t with 7 degrees of freedom passes 6 once in 2000, and so does none of the four.
    assert off.abs().max() < 6
    # 17 levels have log2 17 = 4.09 bits each if nothing is known about them.
    assert 1.5 < exact.mean < 3.5
