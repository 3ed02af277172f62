"""Ranks that share the samples: on the CPU, with gloo."""

from pathlib import Path

import pytest
import ranks
import torch
from ranks import data, model, options, score
from torch import Tensor

import sbm_fast
from sbm_fast import distributed


def test_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    alone = sbm_fast.log_likelihood(model(), sbm_fast.VPSDE(), data(), **options())
    assert len(set(alone.nfe.tolist())) > 1  # the ranks' shares need different numbers
    for got in ranks.run(ranks.likelihood_task, tmp_path):
        for name, value in got.items():
            assert torch.equal(value, getattr(alone, name)), name


def test_seeds_encodings_and_bits(tmp_path: Path) -> None:
    first, second, third = ranks.run(ranks.several_task, tmp_path, count=3)
    for a, b, c in zip(first, second, third, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a, b) and torch.equal(b, c)
        else:
            assert a == b == c
    sde = sbm_fast.VPSDE()
    assert torch.equal(first[2], sbm_fast.encode(score, sde, data(), rtol=1e-3))
    assert torch.equal(first[3], first[2][:1])
    grid = (data().clamp(-1, 1) * 4).round() / 4
    alone = sbm_fast.bits_per_dim(score, sde, grid, levels=9, seed=1, draws=2)
    assert torch.equal(first[4], alone.log_prob)
    assert first[5:] == [alone.mean, alone.mean_stderr]


def test_a_rank_that_fails_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    other, failed = ranks.run(ranks.failing_task, tmp_path)
    assert failed.startswith("ValueError: model: ")
    assert other.startswith("RuntimeError: rank 1 of 2 failed: ValueError: model: ")


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"^torch\.distributed is not initialised"):
        distributed.log_likelihood(score, sbm_fast.VPSDE(), data())
    with pytest.raises(TypeError, match=r"^return_info: "):
        distributed.encode(score, sbm_fast.VPSDE(), data(), return_info=True)


def test_what_the_samples_share_is_not_taken_apart(tmp_path: Path) -> None:
    for message in ranks.run(ranks.ambiguous_task, tmp_path):
        assert message.startswith("ValueError: cond: 'shift' has the first dimension 3")


def test_keys_of_another_length(tmp_path: Path) -> None:
    for message in ranks.run(ranks.keys_task, tmp_path):
        assert message.startswith("ValueError: keys: expected shape (7,)")
