"""Random forwards of norms, sums, factors, activations, branches, views and writes in place:
`sbm_fast.optimize` changes neither their outputs nor what they write into their inputs, nor any
gradient."""

import ast
import copy
import importlib.util
import random
from pathlib import Path

import pytest
import torch

import sbm_fast
from sbm_fast.optimization import aliases, chains, joined

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.GroupNorm(2, 4), nn.GroupNorm(1, 4, affine=False)
        self.conv, self.lin = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)
        self.act, self.act_, self.relu_ = nn.SiLU(), nn.SiLU(inplace=True), nn.ReLU(inplace=True)
        self.drop, self.flag = nn.Dropout(0.5), True

    def forward(self, x, e):
        h, a, v = x * 1.0, x + 0.5, e[:, :, None, None]
        norm, act = self.n1, self.act_
"""
PARTS = {
    "VAR": ["x", "h", "h", "a"],
    "VEC": ["v", "(v * 0.5)", "self.lin(e)[:, :, None, None]", "a.mean((2, 3), keepdim=True)"],
    "NORM": ["self.n1", "self.n2", "self.n1", "norm"],
    "ACT": ["self.act", "F.silu", "self.act_", "self.relu_", "act"],
    "IF": ["self.flag", "not self.flag", "e is not None", "x.shape[0] > 1"],
    "EXPR": [
        "VAR", "NORM(EXPR)", "ACT(NORM(EXPR))", "(NORM(EXPR) * (1 + VEC) + VEC)", "(EXPR + VEC)",
        "torch.addcmul(VEC, NORM(EXPR), VEC + 1)", "self.conv(EXPR)", "VAR.add_(VEC)",
        "self.drop(VAR)", "VAR.view_as(x)", "(VAR * torch.sigmoid(VAR))", "NORM(VAR.add_(VEC))",
    ],
}  # fmt: skip
STATEMENTS = [
    "VAR = EXPR",
    "VAR = VAR",
    "VAR.mul_(0.9)",
    "VAR *= 0.7",
    "h = NORM(VAR)\nh = ACT(h)",
    "h = h + VEC\nh = NORM(h)\nh = h * (1 + VEC) + VEC\nh = ACT(h)",
    "h = self.conv(VAR)\nh += VEC\nh = ACT(NORM(h))",
    "a = h = self.conv(VAR)\nh += VEC\nh = ACT(NORM(h))",
    "h = self.conv(VAR)\na = h\nh += VEC\nh = ACT(NORM(h))",
    "h = NORM(VAR)\nVAR = EXPR\nVAR = ACT(h)",
    "h = NORM(VAR)\nVAR = self.relu_(VAR) + ACT(h)",
    "a = h * (1 + VEC)\na = a + VEC",
    "if IF:\n    h = NORM(VAR)\nelse:\n    VAR = EXPR\nVAR = ACT(h)",
    "if IF:\n    h = h + VEC\nh = ACT(NORM(h))",
    "for _ in range(2):\n    h = NORM(VAR)\n    VAR = ACT(h)",
]


def written(source: random.Random) -> str:
    body = "\n".join(source.choice(STATEMENTS) for _ in range(source.randint(4, 10)))
    depth = 0
    while any(name in body for name in PARTS):
        depth += 1
        for name, choices in PARTS.items():
            while name in body:
                some = choices if depth < 4 or name != "EXPR" else ["VAR"]
                body = body.replace(name, source.choice(some).replace("EXPR", "EXP"), 1)
        body = body.replace("EXP", "EXPR")
    body = "\n".join(" " * 8 + line for line in body.splitlines())
    return f"{HEAD}{body}\n        return h + a + v.mean()\n"


def agrees(number: int, folder: Path) -> bool:
    """Whether a random forward's output, what it leaves in its inputs, and the gradients are the
    same when optimized. Where torch itself refuses a backward there are no gradients to compare."""
    path = folder / f"forward{number}.py"
    path.write_text(written(random.Random(number)))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(number)
    plain = module.Net().double().eval()
    fused = copy.deepcopy(plain)
    assert not sbm_fast.optimize(fused).left
    x, e = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 4).double()
    results = []
    for net in (plain, fused):
        given = x.clone(), e.clone()
        with torch.no_grad():
            results.append([net(*given), *given])
    for net, result in zip((plain, fused), results, strict=True):
        try:
            net(x.clone(), e.clone()).square().mean().backward()
        except RuntimeError:
            if net is fused:
                return False
            break
        result += [p.grad for p in net.parameters() if p.grad is not None]
    return len(results[0]) == len(results[1]) and all(map(torch.allclose, *results))


def test_random_forwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joins = 0
    op = joined.group_norm_silu

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal joins
        joins += any(kwargs[name] is not None for name in ("add", "scale", "activation"))
        return op(*args, **kwargs)

    monkeypatch.setattr(joined, "group_norm_silu", counted)
    assert all(agrees(number, tmp_path) for number in range(60))
    assert joins > 100


def conv(*_: object) -> object:
    return ast.parse("self.conv", mode="eval").body


@pytest.mark.parametrize(
    "where, rule, broken",
    [
        (chains.Chains, "_forgotten", lambda *_: True),
        (chains.Chains, "_leads", lambda _, found, end: found.ends.append(end) or True),
        (chains.Chains, "_maker", conv),
        (chains, "quiet", lambda *_: True),
        (aliases.Aliases, "lasting", lambda *_: True),
    ],
)
def test_random_forwards_tell(
    where: object, rule: str, broken: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any one of the rules for what may wait, some forwards come out differently."""
    monkeypatch.setattr(where, rule, broken)
    assert not all(agrees(number, tmp_path) for number in range(200))
