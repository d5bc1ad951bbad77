"""AnyUp as published, dense and slow: the reference for the results and the cost of every fast path.

One class follows the published algorithm step by step (arXiv 2510.12764), and loads released state dicts as they are.
All queries attend to all keys under a full mask, and `nn.MultiheadAttention` also computes value and output projections
that are not used. The class works in any floating dtype and can be differentiated any number of times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.encoder import ResBlock
from core.fast.windows import window_bounds
from core.published import to_published


class ReferenceAnyUp(nn.Module):
    """(image, features) -> (B,C,Qh,Qw), like `AnyUp` with its baseline fillers.

    Args:
        embed_dim, num_heads, window_ratio, num_basis, kernel_size: as in `AnyUp`'s fillers.
        ordering: `paper` or `released`, see `core.unifiers.BasisConvolution`.
    """

    def __init__(
        self,
        embed_dim: int = 128,
        num_heads: int = 4,
        window_ratio: float = 0.1,
        num_basis: int = 128,
        kernel_size: int = 5,
        ordering: str = "released",
    ):
        super().__init__()
        self.window_ratio, self.ordering = window_ratio, ordering
        self.image_encoder = _encoder(nn.Conv2d(3, embed_dim, 1, bias=False), embed_dim, embed_dim)
        self.query_encoder = _encoder(nn.Conv2d(embed_dim, embed_dim, 1, bias=False), embed_dim, embed_dim)
        self.key_encoder = _encoder(nn.Conv2d(embed_dim, embed_dim, 1, bias=False), embed_dim, embed_dim)
        self.key_features_encoder = _encoder(_Basis(num_basis, kernel_size), num_basis, embed_dim)
        reflect = nn.Conv2d(2 * embed_dim, embed_dim, 3, padding=1, padding_mode="reflect", bias=False)
        self.aggregation = _encoder(reflect, embed_dim, embed_dim)
        self.rope = nn.ParameterDict({"freqs": torch.zeros(2, embed_dim)})
        self.cross_decode = nn.ModuleDict(
            {
                "conv2d": nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=False),
                "cross_attn": nn.ModuleDict(
                    {
                        "norm_q": nn.RMSNorm(embed_dim),
                        "norm_k": nn.RMSNorm(embed_dim),
                        "attention": nn.MultiheadAttention(embed_dim, num_heads, batch_first=True),
                    }
                ),
            }
        )

    def forward(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int] | None = None,
        queries_at_once: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Upsamples (B,C,h,w) features, as `AnyUp.forward`.

        Args:
            queries_at_once: limits the logits held at once, like the option of the released code.
            generator: ignored, as nothing here is random; training gives one to every model.
        """
        guidance = self._rotate(self.image_encoder(image))  # (B,D,H,W)
        query = F.adaptive_avg_pool2d(self.query_encoder(guidance), output_size or image.shape[-2:])
        pooled = F.adaptive_avg_pool2d(self.key_encoder(guidance), features.shape[-2:])  # (B,D,h,w)
        unified = self._unify(F.normalize(features, dim=1))
        key = self.aggregation(torch.cat([pooled, unified], 1))
        return self._attend(self.cross_decode["conv2d"](query), key, features, queries_at_once)

    def _rotate(self, x: Tensor) -> Tensor:
        rows, columns = (torch.linspace(0, 1, n, dtype=x.dtype, device=x.device) for n in x.shape[-2:])
        coords = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)  # (H,W,2)
        angle = (coords @ self.rope["freqs"]).permute(2, 0, 1)  # (D,H,W)
        first, second = x.chunk(2, 1)
        return x * angle.cos() + torch.cat([-second, first], 1) * angle.sin()

    def _unify(self, features: Tensor) -> Tensor:
        layer, *blocks = self.key_features_encoder
        batch, channels, height, width = features.shape
        num_basis, _, kernel_size, _ = layer.basis.shape
        filters = layer.basis.repeat(channels, 1, 1, 1)
        responses = F.conv2d(features, filters, padding=kernel_size // 2, groups=channels)  # (B,C·M,h,w)
        ones = features.new_ones(1, 1, height, width)
        responses = responses / F.conv2d(ones, torch.ones_like(layer.basis[:1]), padding=kernel_size // 2)
        if self.ordering == "released":  # the (channel, filter) layout is read as (filter, channel)
            x = responses.view(batch, num_basis, channels, height, width).softmax(1).mean(2)
        else:
            x = responses.view(batch, channels, num_basis, height, width).softmax(2).mean(1)
        for block in blocks:
            x = block(x)
        return x  # (B,D,h,w)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, queries_at_once: int | None) -> Tensor:
        size = query.shape[-2:]
        parts = self.cross_decode["cross_attn"]
        hidden = _window_mask(size, key.shape[-2:], self.window_ratio).to(query.device)
        query, key, value = (t.flatten(2).transpose(1, 2) for t in (query, key, value))  # (B,N,·)
        normed, step = parts["norm_k"](key), queries_at_once or query.shape[1]
        outputs = []
        for start in range(0, query.shape[1], step):
            some = slice(start, start + step)
            _, weights = parts["attention"](
                parts["norm_q"](query[:, some]), normed, key, attn_mask=hidden[some], average_attn_weights=True
            )
            outputs.append(weights @ value)  # (B,queries,C)
        return torch.cat(outputs, 1).transpose(1, 2).unflatten(2, size)  # (B,C,Qh,Qw)


class _Basis(nn.Module):
    def __init__(self, num_basis: int, kernel_size: int):
        super().__init__()
        self.basis = nn.Parameter(torch.randn(num_basis, 1, kernel_size, kernel_size))


def _encoder(first: nn.Module, first_channels: int, embed_dim: int) -> nn.Sequential:
    return nn.Sequential(first, ResBlock(first_channels, embed_dim), ResBlock(embed_dim, embed_dim))


def _window_mask(size: tuple[int, int], grid: tuple[int, int], window_ratio: float) -> Tensor:
    """(queries, keys) bool: True where a query must not see a key."""
    seen = []
    for num_queries, num_keys in zip(size, grid, strict=True):
        first, last = map(torch.from_numpy, window_bounds(num_queries, num_keys, window_ratio))
        keys = torch.arange(num_keys)
        seen.append((keys >= first[:, None]) & (keys < last[:, None]))  # (queries, keys) of one axis
    rows, columns = seen
    return ~(rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def reference_of(model: nn.Module) -> ReferenceAnyUp:
    """Builds the reference with the weights of a baseline `AnyUp`, with attention `window` or `global`.

    Decoder, refiner and temporal filler must be `none`; this is not checked.

    Raises:
        ValueError: another unifier or attention.
    """
    config = model.config
    unifier, attention = config["unifier"], config["attention"]
    if (unifier["name"], attention["name"]) not in (("learned_basis", "window"), ("learned_basis", "global")):
        raise ValueError(
            "the reference is the baseline only (unifier=learned_basis, attention=window or global), got "
            f"unifier={unifier['name']}, attention={attention['name']}"
        )
    reference = ReferenceAnyUp(
        config["embed_dim"],
        attention["num_heads"],
        attention.get("window_ratio", 0.0),
        unifier["num_basis"],
        unifier["kernel_size"],
        unifier["ordering"],
    )
    reference.to(next(model.parameters())).load_state_dict(to_published(model.state_dict()))
    return reference.train(model.training)
