"""The networks on a GPU: the published outputs, and time tables inside of a CUDA graph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from network_cases import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "networks.npz")


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("name", CASES)
def test_published_outputs_by_a_graph_that_reads_its_rows(name: str) -> None:
    case = CASES[name]
    net, x, labels = case.network().cuda(), case.image().cuda(), torch.tensor(case.labels).cuda()
    cond = {key: value.cuda() for key, value in case.cond.items()}
    want = torch.from_numpy(GOLDEN[name]).cuda()
    prepared, row = net.prepare(labels), torch.tensor([1, 0]).cuda()
    with torch.no_grad():
        plain = net(x, labels, **cond)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                prepared(x, row, **cond)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = prepared(x, row, **cond)
    row.copy_(torch.tensor([0, 1]))
    graph.replay()
    for found in (plain, out):
        assert (found - want).abs().max() < 1e-4 * want.abs().max()
