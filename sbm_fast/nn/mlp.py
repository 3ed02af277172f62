"""`MLP`: a network of vectors that knows what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import silu

from sbm_fast.nn import options
from sbm_fast.nn.blocks import Block
from sbm_fast.nn.embedding import SCALES, time_embedding
from sbm_fast.nn.network import Network


class MLP(Network):
    """Residual network of vectors F(x, label): x [B, features], label [B] -> [B, out_features].

        h_0 = W x,   h_{i+1} = h_i + W''_i SiLU(W'_i SiLU(h_i) + v_i),   F = W_F SiLU(h_depth)

    with v_i projected from the embedding of the label. For points, molecules' or robots' states
    and other small vectors. W_F starts at zero: a new network returns 0.

    Args:
        features: elements of x.
        out_features: elements of F; None: as ``features``.
        width: elements of h.
        depth: residual blocks.
        embedding: "positional" or "fourier".
        embedding_scale: ``max_period`` (positional, default 10000) or ``scale`` (fourier, default
            1).
        embedding_width: width of the time embedding; None: ``width``.
        predicts: "score", "eps", "x0", "v" or "edm", see `sbm_fast.parameterization`.
        time: what ``label`` is: "t", "999t", "index", "sigma", "log_sigma", "edm" or a callable.
        carried: sde, sigma_data, null_cond, variance; see `Network`. ``sample_shape`` is
            (features,).

    Raises:
        TypeError, ValueError: an argument is outside these ranges; the message names it.
    """

    SIZES: ClassVar[tuple[str, ...]] = (
        *("features", "out_features", "width", "depth", "embedding_width"),
    )
    RULES: ClassVar[dict[str, options.Check]] = {
        "features": options.positive,
        "out_features": options.positive,
        "width": options.positive,
        "depth": options.positive,
        "embedding": options.one_of(*SCALES),
        "embedding_scale": options.real,
        "embedding_width": options.positive,
    }

    def __init__(
        self,
        features: int,
        out_features: int | None = None,
        *,
        width: int = 128,
        depth: int = 4,
        embedding: str = "positional",
        embedding_scale: float | None = None,
        embedding_width: int | None = None,
        predicts: str = "eps",
        time: str | Callable[..., Any] = "999t",
        **carried: Any,
    ) -> None:
        out_features = features if out_features is None else out_features
        embedding_width = width if embedding_width is None else embedding_width
        if embedding_scale is None:
            embedding_scale = SCALES[options.choice("embedding", embedding, tuple(SCALES))]
        c = options.checked(self.RULES, locals())
        if carried.get("sample_shape") is None:
            carried["sample_shape"] = (features,)
        super().__init__(c, predicts=predicts, time=time, **carried)
        emb = c["embedding_width"]
        self.embed = time_embedding(c["embedding"], c["embedding_scale"], width, emb)
        self.first = nn.Linear(features, width)
        self.layers = nn.ModuleList(_MLPBlock(width, emb) for _ in range(depth))
        self.last = nn.Linear(width, c["out_features"])
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def time_part(self, label: Tensor) -> Tensor:
        return self.embed(label)

    def body(self, x: Tensor, vs: Sequence[Tensor | None], scale: Tensor | None) -> Tensor:
        """F of the vectors; see `Network.body`."""
        h = self.first(x)
        for layer, v in zip(self.layers, vs, strict=True):
            h = layer(h, v)
        return self.last(silu(h))

    def check_input(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.config["features"]:
            raise ValueError(f"x must be [B, {self.config['features']}], got {list(x.shape)}")

    def _checked_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        sizes = options.positives("sample_shape", shape)
        if sizes != (self.config["features"],):
            raise ValueError(f"sample_shape must be ({self.config['features']},), got {sizes}")
        return sizes

    @classmethod
    def demands(cls, config: Mapping[str, Any]) -> tuple[int, int, dict[str, int]]:
        width, depth, emb = (config[name] for name in ("width", "depth", "embedding_width"))
        sizes = {
            f"width {width}": width**2,
            f"embedding_width {emb}": emb**2,
            f"features {config['features']}": config["features"] * width,
            f"out_features {config['out_features']}": config["out_features"] * width,
        }
        return depth, depth * width * (2 * width + emb), sizes


class _MLPBlock(Block):
    def __init__(self, width: int, emb: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, width)
        self.time: nn.Linear = nn.Linear(emb, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, h: Tensor, v: Tensor) -> Tensor:
        return h + self.linear2(silu(self.linear1(silu(h)) + v))
