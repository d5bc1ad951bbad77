"""`jafar`: attention over the whole image, with keys that the features modulate (one encoder's)."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from core.attention import GlobalAttention
from core.encoder import Encoder
from core.rotary import Rotary
from experiments.peers.base import Peer, register_peer

_RENAMES = {
    "rope.": "rotary.",
    "sft_key.": "modulation.",
    "cross_decode.conv2d.": "attention.conv.",
    "cross_decode.cross_attn.norm_q.": "attention.norm_query.",
    "cross_decode.cross_attn.norm_k.": "attention.norm_key.",
    "cross_decode.cross_attn.attention.q_proj_weight": "attention.project_query.weight",
    "cross_decode.cross_attn.attention.k_proj_weight": "attention.project_key.weight",
    ".norm1.": ".block.0.",
    ".conv1.": ".block.2.",
    ".norm2.": ".block.3.",
    ".conv2.": ".block.5.",
}
_THEIRS = "cross_decode.cross_attn."
_NO_EFFECT = (
    f"{_THEIRS}norm_v.",
    f"{_THEIRS}attention.v_proj_weight",
    f"{_THEIRS}attention.out_proj.",
)
"""Weights of the published file that no output depends on: its attention is used for its weights only."""
NUM_GROUPS = 8


@register_peer("jafar")
class JAFAR(Peer):
    """JAFAR (Couairon et al., NeurIPS 2025, arXiv 2506.11136), which AnyUp grew out of.

    Encoder, rotary embedding and attention are AnyUp's, without a window (`attention=global`). What differs: the image
    and the features meet in the keys alone, where the encoded features f modulate the encoded image k,
    gamma(f) * norm(k) + beta(f); and queries are normalised. The features' encoder has a weight for each channel, so
    it is one encoder's. Attention over all h·w cells for each output position makes the cost grow with the fourth power
    of the image's side; memory does not, as queries are taken in bands.

    Weights: the authors' (Apache-2.0; `{"jafar": state}`), of which the value and output projections, the key's bias
    and `norm_v` are dropped, as no output depends on them; or new ones. Checked beside PaulCouairon/JAFAR @94d4d54
    with its published DINOv2 ViT-S/14 weights: see docs/peers.md for the error.

    Args:
        weights: a file; None: new weights.
        channels: C of new weights.
        embed_dim: width of guidance, queries and keys; a multiple of 8.
        num_heads: heads of attention, whose weights are averaged.
    """

    linear_in_values = False  # the keys look at the features
    nests = ("jafar", "state_dict", "model")

    def __init__(
        self, weights: Path | None = None, channels: int | None = None, embed_dim: int = 128, num_heads: int = 4
    ):
        super().__init__()
        self.channels = self.channels_of(weights, "key_features_encoder.0.weight", channels)
        self.image_encoder = _encoder(3, embed_dim)
        self.rotary = Rotary(embed_dim)
        self.query_encoder = _encoder(embed_dim, embed_dim)
        self.key_encoder = _encoder(embed_dim, embed_dim)
        self.key_features_encoder = _encoder(self.channels, embed_dim)
        self.modulation = nn.ModuleDict(
            {name: nn.Conv2d(embed_dim, embed_dim, 1, bias=False) for name in ("gamma", "beta")}
        )
        self.attention = GlobalAttention(embed_dim, num_heads)
        if weights is not None:
            self.load_weights(weights)

    @classmethod
    def own_names(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, tensor in state.items():
            if name == f"{_THEIRS}attention.in_proj_bias":  # of queries, keys and values; a key's changes no softmax
                renamed["attention.project_query.bias"] = tensor.chunk(3)[0]
            elif not name.startswith(_NO_EFFECT):
                for old, new in _RENAMES.items():
                    name = name.replace(old, new)
                renamed[name] = tensor
        return renamed

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else output_size
        grid = tuple(features.shape[-2:])
        guidance = self.rotary(self.image_encoder(image))  # (B,D,H,W)
        query = F.group_norm(self.query_encoder(guidance, size), NUM_GROUPS)  # (B,D,Qh,Qw)
        key = F.group_norm(self.key_encoder(guidance, grid), NUM_GROUPS)  # (B,D,h,w)
        encoded = self.key_features_encoder(F.normalize(features, dim=1))  # (B,D,h,w)
        key = self.modulation.gamma(encoded) * key + self.modulation.beta(encoded)  # (B,D,h,w)
        return self.attention(query, key, features)  # (B,C,Qh,Qw)


def _encoder(in_channels: int, embed_dim: int) -> Encoder:
    stem = nn.Conv2d(in_channels, embed_dim, 1, bias=False)
    return Encoder(stem, embed_dim, embed_dim)
