"""sbm_fast behind the same three methods as the baselines: reset, left, advance."""

import torch
from torch import Tensor, nn

import sbm_fast
from benchmarks.baselines import SNR, STEPS, Draw
from sbm_fast.methods import make_plan
from sbm_fast.model import ScoreModel
from sbm_fast.plan import Plan
from sbm_fast.run import Run
from sbm_fast.sampler import Sampler


def score_model(network: nn.Module) -> ScoreModel:
    """The network as score_sde uses it: time label 999·t where it predicts noise."""
    predicts = str(network.predicts)
    label = "999t" if predicts == "eps" else "t"
    return ScoreModel(network, predicts=predicts, time=label, sde=sbm_fast.VPSDE())


def options(corrector: bool, steps: int = STEPS) -> dict[str, object]:
    """The method and its options; compat takes over score_sde's grid, tables and norms."""
    if not corrector:
        return {"method": "em", "steps": steps, "compat": "score_sde"}
    names = {"predictor": "reverse_diffusion", "corrector": "langevin", "norm": "batch_mean"}
    return {"method": "pc", "steps": steps, "compat": "score_sde", "snr": SNR, **names}


def make_sampler(
    network: nn.Module, corrector: bool, shape: tuple[int, ...], steps: int = STEPS
) -> Sampler:
    """A prepared public sampler on the compiled CPU kernels."""
    return Sampler(
        score_model(network),
        sbm_fast.VPSDE(),
        shape,
        backend="cpu",
        **options(corrector, steps),  # type: ignore[arg-type]
    )


class Ours:
    """Steps of a prepared `Sampler`'s `Run`, with everything that a user's loop pays."""

    def __init__(
        self,
        network: nn.Module,
        corrector: bool,
        shape: tuple[int, ...],
        draw: Draw | None = None,
    ) -> None:
        self.sampler, self.draw = make_sampler(network, corrector, shape), draw
        self.rows_per_step = 2 if corrector else 1
        self.run: Run | None = None

    def reset(self, x: Tensor) -> None:
        draw = self.draw
        noise = None if draw is None else lambda number, stream: draw(x)
        self.run = self.sampler.start(seed=0, x_init=x, noise=noise)
        self.run.advance(_start_rows(self.run.plan))

    @property
    def left(self) -> int:
        return 0 if self.run is None else (self.run.plan.rows - self.run.row) // self.rows_per_step

    def advance(self, steps: int) -> None:
        assert self.run is not None
        self.run.advance(steps * self.rows_per_step)

    @property
    def x(self) -> Tensor:
        assert self.run is not None
        return self.run.x


class OursOp:
    """The op alone, `torch.ops.sbm_fast.affine_step_`, without the loop around it.

    For Euler–Maruyama only: its network output is fixed.
    """

    def __init__(
        self, network: nn.Module, shape: tuple[int, ...], draw: Draw | None = None
    ) -> None:
        self.draw = draw
        self.out = network(torch.empty(0), torch.empty(0))
        sde = sbm_fast.VPSDE()
        arguments = {"given_start": True, **options(False)}
        self.plan = make_plan(model=score_model(network), sde=sde, **arguments)  # type: ignore[arg-type]
        self.coef, self.field = self.plan.pack(torch.float32)
        numbers = torch.arange(self.plan.rows, dtype=torch.int32)
        self.rows = numbers[:, None].expand(-1, shape[0]).unbind(0)
        self.keys = sbm_fast.noise.keys(0, shape[0])
        self.time, self.bad = torch.zeros(shape[0]), torch.full((shape[0],), -1, dtype=torch.int32)
        self.i = self.plan.rows

    def reset(self, x: Tensor) -> None:
        self.x, self.i = x.clone(), _start_rows(self.plan)

    @property
    def left(self) -> int:
        return self.plan.rows - self.i

    def advance(self, steps: int) -> None:
        step = torch.ops.sbm_fast.affine_step_.default
        for row in self.rows[self.i : self.i + steps]:
            z = None if self.draw is None else self.draw(self.x)
            step(
                self.x, self.out, None, None, None, self.keys, row, self.coef, self.field, None, z,
                None, self.time, self.bad,
            )  # fmt: skip
        self.i += steps


def _start_rows(plan: Plan) -> int:
    return int(plan.evaluates.argmax())
