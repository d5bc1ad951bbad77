"""`loftup`: LoftUp, a transformer from coordinates and colours to features (one encoder's)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.peers.base import Peer, register_peer
from experiments.peers.fourier import ChannelNorm, FourierFeatures, corner_grid
from experiments.peers.guidance import scaled_colours, sized

_NUM_FREQS = 20  # of coordinates and colours of the output
_PLACE_FREQS = 5  # of coordinates of the features
_PLACES = 2 * 2 * _PLACE_FREQS


class _CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm_q = nn.LayerNorm(dim)
        self.norm_kv = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        tokens = self.norm_kv(tokens)
        return self.attention(self.norm_q(query), tokens, tokens, need_weights=False)[0]


class _FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        # the authors' dropout, of probability 0, keeps the number of the last layer
        self.net = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Transformer(nn.Module):
    def __init__(self, dim: int, hidden: int, depth: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([_CrossAttention(dim, num_heads), _FeedForward(dim, hidden)]) for _ in range(depth)
        )

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """(B,Qh·Qw,dim), (B,h·w,dim) -> (B,Qh·Qw,dim)."""
        for attention, feed_forward in self.layers:
            query = query + attention(query, tokens)
            query = query + feed_forward(query)
        return self.norm(query)


class _PixelNorm(nn.LayerNorm):
    """Layer norm over channels, with the names of the authors' last layer."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Upsampler(nn.Module):
    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        start, dim = 5 * 2 * _NUM_FREQS + 3, channels + _PLACES
        self.lr_pe = FourierFeatures(2, _PLACE_FREQS)
        self.fourier_feat = nn.ModuleList([nn.Identity(), FourierFeatures(5, _NUM_FREQS)])
        self.first_conv = nn.Sequential(
            ChannelNorm(start),
            nn.Conv2d(start, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
        )
        self.final_conv = nn.Sequential(nn.Conv2d(dim, channels, 1), _PixelNorm(channels))
        self.ca_transformer = _Transformer(dim, channels, depth=2, num_heads=num_heads)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        """(B,3,Qh,Qw), normalised (B,C,h,w) -> (B,C,Qh,Qw)."""
        size = tuple(image.shape[-2:])
        colours = scaled_colours(image)
        pixels = torch.cat([corner_grid(size, image), colours], dim=1)  # (B,5,Qh,Qw)
        query = self.first_conv(torch.cat([self.fourier_feat[1](pixels), colours], dim=1))  # (B,C+20,Qh,Qw)
        places = self.lr_pe(corner_grid(tuple(features.shape[-2:]), features))  # (B,20,h,w)
        tokens = torch.cat([features, places], dim=1)  # (B,C+20,h,w)
        output = self.ca_transformer(query.flatten(2).transpose(1, 2), tokens.flatten(2).transpose(1, 2))
        return self.final_conv(output.transpose(1, 2).unflatten(2, size))


@register_peer("loftup")
class LoftUp(Peer):
    """LoftUp (Huang, Chen, Havrylov, Geiger & Zhang, arXiv 2504.14032, ICCV 2025).

    Queries are made of each output pixel's coordinates and colour, and attend to all features. The output is a layer
    norm of the transformer's result, no mean of the features. So its scale is not theirs, and heads have to be trained
    on it. The authors' output has the image's size; for another size the image is first resized to it. They scale
    colours over a whole batch; here each image is scaled alone. Their second stage of training, on masks and with a
    teacher, is left out: `experiments.train` trains it as every other.

    Parity: andrehuang/loftup @6620d9b (MIT), equal random weights and batch statistics, C 384, output of the image's
    size, images one by one: largest error 9.4e-7 of the largest output.

    Args:
        weights: a file; None: new weights.
        channels: C of new weights.
        num_heads: of attention; the authors' weights have 4.

    Raises:
        ValueError: heads that cannot share C + 20 channels.
    """

    def __init__(self, weights: Path | None = None, channels: int | None = None, num_heads: int = 4):
        super().__init__()
        self.channels = self.channels_of(weights, "channelnorm.norm.weight", channels, axis=0)
        dim = self.channels + _PLACES
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"loftup has {dim} channels for C {self.channels}: num_heads={num_heads} cannot share them"
            )
        self.upsampler = _Upsampler(self.channels, num_heads)
        self.channelnorm = ChannelNorm(self.channels)
        if weights is not None:
            self.load_weights(weights)

    @classmethod
    def own_names(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Files of the authors' training have the encoder as `model.0` and the norm of features as `model.1`."""
        renamed = {name.replace("model.1.", "channelnorm."): tensor for name, tensor in state.items()}
        return {name: tensor for name, tensor in renamed.items() if not name.startswith("model.")}

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else tuple(output_size)
        return self.upsampler(sized(image, size), self.channelnorm(features))
