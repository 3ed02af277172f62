"""What a likelihood loses that has nothing to do with its solver: the table in docs/likelihood.md.

    python tests/likelihood_truncation.py           prints it
    python tests/likelihood_truncation.py --write   puts it into docs/likelihood.md

All of it in closed form, no ODE is solved: a likelihood is log p at t_min, not at 0, and takes the
prior for the law at t_max.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import likelihood_cases as cases
import torch
from torch import Tensor

DOCS = Path(__file__).resolve().parents[1] / "docs" / "likelihood.md"
SAMPLES = 4096
SHOWN = ("2-D mixture", "64-D mixture")


def start(data: cases.Mixture, sde: cases.SDE) -> Tensor:
    """log p at t_min − log p_data, at data [SAMPLES]."""
    x, _ = data.sample(SAMPLES, seed=0)
    clean = cases.Marginal(data, torch.ones(()).double(), torch.zeros(()).double())
    return data.at(sde, cases.first_time(sde)).log_prob(x) - clean.log_prob(x)


def end(data: cases.Mixture, sde: cases.SDE) -> Tensor:
    """log prior − log p at t_max, at states of t_max [SAMPLES]."""
    law = data.at(sde, sde.t_max)
    x = law.sample(SAMPLES, seed=1)
    square = (x / sde.prior_std).square().sum(1)
    prior = -0.5 * square - x.shape[1] * math.log(sde.prior_std * math.sqrt(2 * math.pi))
    return prior - law.log_prob(x)


def table() -> str:
    """Root mean square and largest size over the samples; nats per sample."""
    lines = [
        "| data | SDE | t_min: rms | largest | prior: rms | largest |",
        "|---|---|---|---|---|---|",
    ]
    for name in SHOWN:
        for sde_name, sde in cases.SDES.items():
            cells = []
            for loss in (start(cases.CASES[name], sde), end(cases.CASES[name], sde)):
                sizes = loss.square().mean().sqrt(), loss.abs().max()
                cells += [f"{float(size):.1e}" for size in sizes]
            lines.append(f"| {name} | {sde_name} | {' | '.join(cells)} |")
    note = f"Nats per sample over {SAMPLES} samples: `python tests/likelihood_truncation.py`."
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(table())
        return
    sys.path.append(str(DOCS.parents[1]))
    from benchmarks.readme import with_section

    text = DOCS.read_text(encoding="utf-8")
    DOCS.write_text(with_section(text, "truncation", table()), encoding="utf-8")


if __name__ == "__main__":
    main()
