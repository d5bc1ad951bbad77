"""`vit_up`: ViT-Up, queries that pass through the encoder's own layers (one encoder's)."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.backbones import normalize
from core.backbones.timm import TimmBackbone
from experiments.peers.base import register_peer
from experiments.peers.encoders import EncoderPeer
from experiments.peers.guidance import centre_coords

_HEAD_DIM = 64
_FINER = 8  # times finer than the features: the grid on which patches are embedded for the queries
_BANDS, _MAX_RESOLUTION = 16, 10  # of the place relative to the nearest token
_ROPE_BASE = 100
_QUERIES_AT_ONCE = 2**14


class _Layers(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class _PlaceCode(nn.Module):
    """Sines and cosines of (x, y), and (x, y) themselves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("freqs", torch.linspace(1, _MAX_RESOLUTION / 2, _BANDS))

    def forward(self, place: Tensor) -> Tensor:
        """(N,2) -> (N,66)."""
        angles = math.pi * place[..., None] * self.freqs.to(place.dtype)  # (N,2,16)
        return torch.cat([angles.sin().flatten(1), angles.cos().flatten(1), place], dim=1)


class _CrossAttention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def keys_values(self, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """(B,L,C), (L,2) -> 2 x (B,heads,L,64)."""
        return rotated(_heads(self.k_proj(tokens)), places), _heads(self.v_proj(tokens))

    def forward(self, query: Tensor, places: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B,N,C), (N,2) in cells -> (B,N,C)."""
        query = rotated(_heads(self.q_proj(query)), places)
        found = F.scaled_dot_product_attention(query, key, value)  # (B,heads,N,64)
        return self.out_proj(found.transpose(1, 2).flatten(2))


class _Local(nn.Module):
    """The nearest token, modulated by the query's place in it (FiLM)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_input = nn.LayerNorm(dim)
        self.gamma_beta_mlp = _Layers(nn.Linear(4 * _BANDS + 2, dim), nn.GELU(), nn.Linear(dim, 2 * dim))
        self.post_mlp = _Layers(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        for parameter in self.gamma_beta_mlp.mlp[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, nearest: Tensor, code: Tensor) -> Tensor:
        """(B,N,C), (N,66) -> (B,N,C)."""
        gain, shift = self.gamma_beta_mlp(code).chunk(2, dim=-1)
        return self.post_mlp(self.norm_input(nearest) * (1 + gain) + shift)


class _Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.transition_mlp = _Layers(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.cross_attention = _CrossAttention(dim)
        self.featx = _Local(dim)
        self.norm_q_global, self.norm_h_local, self.norm_h_global, self.norm_post = (
            nn.LayerNorm(dim) for _ in range(4)
        )
        self.mlp = _Layers(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, query: Tensor, places: Tensor, keys_values: tuple[Tensor, Tensor], nearest: Tensor, code: Tensor
    ) -> Tensor:
        """(B,N,C) queries at (N,2) places in cells -> (B,N,C)."""
        query = query + self.transition_mlp(query)
        query = query + self.cross_attention(self.norm_q_global(query), places, *keys_values)
        query = query + self.norm_h_local(self.featx(nearest, code))
        return query + self.mlp(self.norm_post(query))


@register_peer("vit_up")
class ViTUp(EncoderPeer):
    """ViT-Up (Wandel, Wang & Wang, arXiv 2606.14024), without LoRA on the encoder.

    The image is no guidance. Each query begins as the embedding of a patch around its point, in the image enlarged
    eightfold, and passes one block for every second layer of the encoder: it attends to that layer's tokens, and to the
    nearest of them. The result is a prediction, no mean of the features.

    The hidden layers are not in `features`. So the peer has the encoder itself, and runs it on `image`, resized so that
    it gives the grid of the features; the last layer is `features` as given. That costs an encoder's forward each time.
    Guidance smaller than what the encoder saw gives hidden layers of a more blurred image.

    Left out: LoRA on the encoder, which here stays frozen, and the losses on inner layers (`experiments.train` has one
    target). Decoders of inner layers exist for the authors' names, and are not trained. Written from the paper's
    equations, without the authors' code (it has no licence), so there is no parity with it. These are read into the
    equations: block i looks at layer 2i; places in a token range over [-1,1]; the order of sines and cosines. Authors'
    weights, made together with LoRA, load, but may not give the authors' output.

    Args:
        encoder: name of the backbone that the features are of: a ViT of timm with heads of 64 channels and its last
            layer as features.
        encoder_weights: file with its weights; None: its pretrained weights.
        weights: state dict of the authors' names; None: random weights.

    Raises:
        ValueError: an encoder of another kind.
    """

    def __init__(self, encoder: str, encoder_weights: Path | None = None, weights: Path | None = None):
        super().__init__(encoder, encoder_weights)
        kept = self.encoder
        trunk = getattr(kept, "trunk", None)
        if not (isinstance(kept, TimmBackbone) and hasattr(trunk, "blocks") and hasattr(trunk, "patch_embed")):
            raise ValueError(f"vit_up looks at the layers of a ViT of timm, and {encoder} is none: choose another")
        if kept.default_layer != kept.num_layers - 1 or kept.num_layers < 2 or kept.channels % _HEAD_DIM:
            raise ValueError(
                f"vit_up needs the last of at least two layers and heads of {_HEAD_DIM} channels; {encoder} has "
                f"{kept.num_layers} layers, the features are of layer {kept.default_layer}, C {kept.channels}"
            )
        num = kept.num_layers // 2
        self.layers = [kept.num_layers - 1 - 2 * i for i in reversed(range(num))]  # every second, up to the last
        self.rel_pos_enc = _PlaceCode()
        self.vit_up_blocks = nn.ModuleList(_Block(kept.channels) for _ in range(num))
        self.decoder_mlp = nn.ModuleList(
            _Layers(nn.LayerNorm(kept.channels), nn.Linear(kept.channels, kept.channels)) for _ in range(num + 1)
        )
        self.decoder_mlp[:-1].requires_grad_(False)
        if weights is not None:
            self.load_weights(weights)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else tuple(output_size)
        rgb = self.seen(image, features)
        hidden = [*(layer.to(features.dtype) for layer in self._hidden(rgb)), features]  # num x (B,C,h,w)
        start = self._embedded(rgb).to(features.dtype)  # (B,C,8h,8w)
        grid = tuple(features.shape[-2:])
        cells = features.new_tensor(grid)
        places = (centre_coords(grid, features) * cells).flatten(0, 1)  # (L,2), in cells
        tokens = [layer.flatten(2).transpose(1, 2) for layer in hidden]  # num x (B,L,C)
        keys_values = [
            block.cross_attention.keys_values(block.norm_h_global(layer), places)
            for block, layer in zip(self.vit_up_blocks, tokens, strict=True)
        ]
        outputs = []
        for coords in centre_coords(size, features).flatten(0, 1).split(_QUERIES_AT_ONCE):  # (N,2) in the unit square
            query = F.grid_sample(
                start, 2 * coords.flip(-1).expand(len(start), 1, -1, -1) - 1, padding_mode="border", align_corners=False
            )  # (B,C,1,N)
            query, place = query[:, :, 0].transpose(1, 2), coords * cells  # (B,N,C)
            row, column = torch.minimum(place.floor(), cells - 1).long().unbind(-1)
            inside = 2 * (place - place.floor()) - 1  # (N,2)
            code = self.rel_pos_enc(inside.flip(-1))
            for block, pair, layer in zip(self.vit_up_blocks, keys_values, tokens, strict=True):
                query = block(query, place, pair, layer[:, row * grid[1] + column], code)
            outputs.append(self.decoder_mlp[-1](query))
        return torch.cat(outputs, dim=1).transpose(1, 2).unflatten(2, size)  # (B,C,Qh,Qw)

    @torch.no_grad()
    def _hidden(self, rgb: Tensor) -> list[Tensor]:
        """(B,3,H,W) -> (B,C,h,w) of every second layer but the last."""
        if len(self.layers) == 1:
            return []
        return self.encoder.trunk.forward_intermediates(
            self._pixels(rgb),
            indices=self.layers[:-1],
            norm=False,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )

    @torch.no_grad()
    def _embedded(self, rgb: Tensor) -> Tensor:
        """(B,3,H,W) -> (B,C,8h,8w) patches of the enlarged image, without places."""
        large = F.interpolate(rgb, scale_factor=_FINER, mode="bilinear")
        return self.encoder.trunk.patch_embed.proj(self._pixels(large))

    def _pixels(self, rgb: Tensor) -> Tensor:
        """RGB in [0,1] -> as the encoder's network takes it."""
        return normalize(rgb, self.encoder.mean, self.encoder.std).to(next(self.encoder.parameters()).dtype)


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """(B,heads,N,64) at (N,2) places (row, column) in cells -> the same, with pairs of channels turned (RoPE).

    The first half of the channels is turned by columns and the second by rows, pair i by 2 pi place / 100^(i/16).
    """
    num = x.shape[-1] // 4  # pairs for each axis
    turns = 2 * math.pi * float(_ROPE_BASE) ** (-torch.arange(num, device=x.device, dtype=places.dtype) / num)
    angles = (places.flip(-1)[..., None] * turns).flatten(1)  # (N,32)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B,heads,N,32)
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, _HEAD_DIM)).transpose(1, 2)  # (B,N,C) -> (B,heads,N,64)
