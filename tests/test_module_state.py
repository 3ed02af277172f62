"""Networks are put back as they were after a run, also where several runs share them."""

import pytest
import torch
from torch import nn

from sbm_fast.module_state import eval_mode, frozen


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    net[1].eval()
    net[2].bias.requires_grad_(False)
    return net


def state(net: nn.Module) -> list[bool]:
    return [m.training for m in net.modules()] + [p.requires_grad for p in net.parameters()]


def test_the_last_one_out_puts_it_back() -> None:
    net = network()
    before = state(net)
    first, second = [[how(net) for how in (eval_mode, frozen)] for _ in range(2)]
    for block in (*first, *second):
        block.__enter__()
        assert not net[0].training
    assert not any(state(net))
    for block in first:
        block.__exit__(None, None, None)
    assert not any(state(net))
    for block in second:
        block.__exit__(None, None, None)
    assert state(net) == before


def test_an_error_puts_it_back() -> None:
    net = network()
    before = state(net)
    with pytest.raises(ZeroDivisionError), eval_mode(net), frozen(net):
        net(torch.ones(1, 2)).sum() / 0
        raise ZeroDivisionError
    assert state(net) == before


def test_other_callables_are_left_alone() -> None:
    with eval_mode(torch.sin), frozen(torch.sin):
        assert torch.sin(torch.zeros(1)) == 0
