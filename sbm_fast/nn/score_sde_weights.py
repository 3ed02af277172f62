"""Where the tensors of score_sde's ``NCSNpp`` and ``DDPM`` go: its list of layers against ours."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sbm_fast.nn.blocks import Downsample, ResidualBlock, SelfAttention, Upsample
from sbm_fast.nn.embedding import TurnsEmbedding
from sbm_fast.nn.levels import InputSkip
from sbm_fast.nn.peer_weights import PeerTensor, join, tensors_of

_BLOCK = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "time": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
}
_LAYERS = (
    ResidualBlock,
    SelfAttention,
    Downsample,
    Upsample,
    InputSkip,
    TurnsEmbedding,
    nn.GroupNorm,
    nn.Conv2d,
    nn.Linear,
)


def tensors(net: nn.Module, emb: int) -> list[PeerTensor]:
    """Its ``all_modules`` are our layers in the order of their registration.

    Args:
        net: the network.
        emb: width of its embedding.
    """
    found: list[PeerTensor] = []
    for number, (ours, module) in enumerate(_layers(net, "")):
        found += _peers_of(module, ours, f"all_modules.{number}", emb)
    return found


def _layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """What is one member of ``all_modules`` there, with its name here."""
    if isinstance(module, _LAYERS):
        yield name, module
        return
    for child, part in module.named_children():
        yield from _layers(part, join(name, child))


def _peers_of(module: nn.Module, ours: str, theirs: str, emb: int) -> list[PeerTensor]:
    if isinstance(module, TurnsEmbedding):
        frequencies = join(ours, "frequencies")
        shape = tuple(module.frequencies.shape)
        return [PeerTensor(f"{theirs}.W", shape, frequencies, trainable=False)]
    if isinstance(module, SelfAttention):
        return _attention(module, ours, theirs)
    if isinstance(module, (Downsample, Upsample)):
        if module.conv is None:
            return []
        name = "Conv_0" if module.filter.box else "Conv2d_0"
        return tensors_of(module, ours, {"conv": name}, theirs)
    if isinstance(module, InputSkip):
        return tensors_of(module, ours, {"conv": "Conv_0"}, theirs)
    if not isinstance(module, ResidualBlock):
        return tensors_of(module, ours, {"": ""}, theirs)
    found = []
    for own, peer in _BLOCK.items():
        if getattr(module, own) is not None:
            found += tensors_of(module, ours, {own: peer}, theirs)
            continue
        # Without time the original has these all the same, and uses them nowhere.
        outputs = module.conv1.out_channels
        shapes = {"weight": (outputs, emb), "bias": (outputs,)}
        found += [PeerTensor(f"{theirs}.{peer}.{k}", shape, None) for k, shape in shapes.items()]
    if isinstance(module.skip, nn.Identity):
        return found
    if module.project:
        return found + tensors_of(module, ours, {"skip": "Conv_2"}, theirs)
    assert isinstance(module.skip, nn.Conv2d)
    return found + _product(module.skip, join(ours, "skip"), f"{theirs}.NIN_0", None)


def _attention(module: SelfAttention, ours: str, theirs: str) -> list[PeerTensor]:
    """q, k and v are products of their own there."""
    channels = module.out.in_channels
    found = tensors_of(module, ours, {"norm": "GroupNorm_0"}, theirs)
    for i in range(3):
        rows = (i * channels, (i + 1) * channels)
        found += _product(module.qkv, join(ours, "qkv"), f"{theirs}.NIN_{i}", rows)
    return found + _product(module.out, join(ours, "out"), f"{theirs}.NIN_3", None)


def _product(
    conv: nn.Conv2d, ours: str, theirs: str, rows: tuple[int, int] | None
) -> list[PeerTensor]:
    """ "NIN" there: W [in, out] and b [out]."""
    outputs, inputs = conv.weight.shape[:2]
    outputs = outputs if rows is None else rows[1] - rows[0]
    weight = PeerTensor(f"{theirs}.W", (inputs, outputs), f"{ours}.weight", rows, "product")
    return [weight, PeerTensor(f"{theirs}.b", (outputs,), f"{ours}.bias", rows)]
