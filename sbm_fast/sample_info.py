"""What a sampling run did."""

from dataclasses import dataclass

from torch import Tensor

from sbm_fast.plan import Plan


@dataclass(frozen=True)
class SampleInfo:
    """What a sampling run did.

    Attributes:
        nfe: network evaluations per sample (two a row under guidance); of the sample that took
            most where each has its own steps.
        seed: the seed that gave the keys; None when `keys` were given.
        seconds: wall time of the loop; seconds_network of it in the network, seconds_sampler in
            everything else. On a GPU only `seconds` is known (launches are asynchronous), the
            others are NaN.
        backend: the kernels that ran.
        plan: the table that was run; None for an adaptive solver, which has none.
        nfe_of: int64 [B], each sample's own; None where all have the same.
    """

    nfe: int
    seed: int | None
    seconds: float
    seconds_network: float
    seconds_sampler: float
    backend: str
    plan: Plan | None
    nfe_of: Tensor | None = None
