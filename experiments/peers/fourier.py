"""Sines and cosines of coordinates and colours, with learned phases: FeatUp's implicit network and LoftUp use them."""

import torch
from torch import Tensor, nn


class FourierFeatures(nn.Module):
    """Sines and cosines of each input at `num_freqs` frequencies, exp(-2) to exp(10), evenly on a logarithmic scale.

    `biases` are the phases: (2,inputs,num_freqs), of sines and of cosines. As in the authors' weights, they are read as
    num_freqs rows of inputs.
    """

    def __init__(self, inputs: int, num_freqs: int):
        super().__init__()
        self.inputs, self.num_freqs = inputs, num_freqs
        self.biases = nn.Parameter(torch.randn(2, inputs, num_freqs))

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,H,W) -> (B,2·num_freqs·inputs,H,W): all sines, then all cosines, each by frequency."""
        wide = torch.promote_types(x.dtype, torch.float32)
        freqs = torch.linspace(-2, 10, self.num_freqs, device=x.device, dtype=wide).exp()
        angles = x[:, None] * freqs[:, None, None, None]  # (B,freqs,inputs,H,W), at least in single precision
        sines, cosines = self.biases.reshape(2, self.num_freqs, self.inputs, 1, 1)
        waves = torch.cat([(angles + sines).sin().flatten(1, 2), (angles + cosines).cos().flatten(1, 2)], dim=1)
        return waves.to(x.dtype)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def corner_grid(size: tuple[int, int], like: Tensor) -> Tensor:
    """(B,2,h,w) rows and columns of a grid, -1 in the first and 1 in the last, with the batch of `like`."""
    wide = torch.promote_types(like.dtype, torch.float32)
    axes = (torch.linspace(-1, 1, n, device=like.device, dtype=wide).to(like.dtype) for n in size)
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(like), -1, -1, -1)
