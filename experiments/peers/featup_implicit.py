"""`featup_implicit`: FeatUp's network of coordinates and colours, fitted to each image with its encoder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from experiments.peers.base import CannotUpsample, register_peer
from experiments.peers.encoders import EncoderPeer, encoded
from experiments.peers.fourier import ChannelNorm, FourierFeatures
from experiments.peers.guidance import centre_coords, sized

_NUM_FREQS = 30
_DROPOUT = 0.2
_MOST_PAD, _MOST_ZOOM = 30, 1.8  # pixels, and times
_MAGNITUDE, _MAGNITUDE_VARIATION, _BLUR = 0.001, 0.05, 0.1  # weights of the losses
_VIEWS_FOR_COMPONENTS = 50
_VIEWS_AT_ONCE = 16
_PIXELS_AT_ONCE = 2**17


@register_peer("featup_implicit")
class FeatUpImplicit(EncoderPeer):
    """FeatUp's implicit form (Fu, Hamilton, Brandt, Feldmann, Zhang & Freeman, arXiv 2403.10516, ICLR 2024).

    For each image a small network from coordinates and colours to features is fitted, so that its output, moved,
    zoomed, mirrored and then pooled by a learned attention, gives what the encoder gives for the moved image. So the
    peer has the encoder itself, and runs it on `num_views` views of `image`; it takes minutes. `features` only say the
    grid and are checked to be the encoder's. The output is a prediction, no mean of the features.

    Differences from the authors' code (mhamilton723/FeatUp @6b5a6c0, MIT): dropout before the attention is drawn once
    for each pixel and not for each of its windows; views are sampled bilinearly, with the image mirrored at its
    borders; image and grid need not be square; outputs of another size are asked of the network at their own
    places. Network and pooling agree with theirs on equal random weights, without dropout: largest error 5.5e-13 of the
    largest output in double precision; in single 2.9e-4, as angles of 2e4 are rounded. Whole fits cannot be compared,
    because random numbers are others.

    Args:
        encoder: name of the backbone that the features are of.
        encoder_weights: file with its weights; None: its pretrained weights.
        num_steps: of NAdam, the authors' 1200.
        num_views: views of the image that the encoder sees, the authors' 3000.
        views_per_step: of them, drawn in each step.
        components: principal components of the features, which the network predicts, at most C.
        kernel: rows and columns of pixels that are pooled to one feature.

    Raises:
        ValueError: a number below 1, or a negative number of steps.
    """

    optimises = True

    def __init__(
        self,
        encoder: str,
        encoder_weights: Path | None = None,
        num_steps: int = 1200,
        num_views: int = 3000,
        views_per_step: int = 10,
        components: int = 128,
        kernel: int = 29,
    ):
        super().__init__(encoder, encoder_weights)
        if num_steps < 0 or min(num_views, views_per_step, components, kernel) < 1:
            raise ValueError(
                "featup_implicit needs num_steps from 0, and num_views, views_per_step, components and kernel from 1, "
                f"got {num_steps}, {num_views}, {views_per_step}, {components}, {kernel}"
            )
        self.num_steps, self.num_views, self.views_per_step = num_steps, num_views, views_per_step
        self.components, self.kernel = components, kernel

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else tuple(output_size)
        rgb = self.seen(image, features)
        if any(n < self.kernel + cells - 1 for n, cells in zip(rgb.shape[-2:], features.shape[-2:], strict=True)):
            raise CannotUpsample(
                f"peer {self.choice}: kernels of {self.kernel} pixels, one for each feature, do not fit into the "
                f"encoder's image of {rgb.shape[2]}x{rgb.shape[3]}: set a smaller kernel"
            )
        self.check_own(encoded(self.encoder, rgb, _VIEWS_AT_ONCE), features)
        outputs = []
        for one in rgb.split(1):
            with torch.random.fork_rng([one.device] if one.is_cuda else []):
                torch.manual_seed(0)  # each image is fitted with the same random numbers, whatever came before
                outputs.append(self._fit(one, tuple(features.shape[-2:])).at(one, size))
        return torch.cat(outputs).to(features.dtype)  # (B,C,Qh,Qw)

    def _fit(self, rgb: Tensor, grid: tuple[int, int]) -> "Fitted":
        """(1,3,H,W) RGB, (h,w) -> the network of the image."""
        moves = drawn_moves(self.num_views, tuple(rgb.shape[-2:])).to(rgb)
        views = (encoded(self.encoder, moved(rgb, some), len(some)) for some in moves.split(_VIEWS_AT_ONCE))
        targets = torch.cat([view.to(rgb.dtype) for view in views])  # (N,C,h,w)
        mean, axes = principal_axes(targets[:_VIEWS_FOR_COMPONENTS], self.components)
        targets = torch.einsum("nchw,cd->ndhw", targets - mean[:, None, None], axes)
        with torch.enable_grad():
            network = Network(axes.shape[1]).to(rgb)
            pool = Pooling(axes.shape[1] + 1, self.kernel, grid).to(rgb)
            scale = Scale(axes.shape[1]).to(rgb)
            parts = nn.ModuleList([network, pool, scale]).train()
            optimizer = torch.optim.NAdam(parts.parameters())
            for _ in range(self.num_steps):
                optimizer.zero_grad()
                chosen = torch.randint(self.num_views, (self.views_per_step,)).to(moves.device)
                step(network, pool, scale, rgb, moves[chosen], targets[chosen])
                optimizer.step()
        return Fitted(network.eval(), mean, axes)


@dataclass
class Fitted:
    """The network of one image."""

    network: "Network"
    mean: Tensor
    """(C,)"""
    axes: Tensor
    """(C,D) principal components."""

    @torch.no_grad()
    def at(self, rgb: Tensor, size: tuple[int, int]) -> Tensor:
        """(1,3,H,W) RGB that was fitted -> (1,C,Qh,Qw)."""
        pixels = self.network.pixels(sized(rgb, size), rgb)  # (1,5,Qh,Qw)
        rows = max(1, _PIXELS_AT_ONCE // size[1])
        found = torch.cat([self.network(band) for band in pixels.split(rows, dim=2)], dim=2)  # (1,D,Qh,Qw)
        return torch.einsum("bdhw,cd->bchw", found, self.axes) + self.mean[:, None, None]


class Network(nn.Module):
    """Coordinates and colours of a pixel -> D components of its feature."""

    def __init__(self, components: int):
        super().__init__()
        self.waves = FourierFeatures(5, _NUM_FREQS)
        width = 2 * 5 * _NUM_FREQS + 3
        self.layers = nn.Sequential(
            ChannelNorm(width),
            nn.Dropout2d(_DROPOUT),
            nn.Conv2d(width, components, 1),
            nn.ReLU(),
            nn.Dropout2d(_DROPOUT),
            ChannelNorm(components),
            nn.Conv2d(components, components, 1),
            nn.ReLU(),
            nn.Conv2d(components, components, 1),
        )

    @staticmethod
    def pixels(rgb: Tensor, fitted: Tensor) -> Tensor:
        """(1,3,Qh,Qw), (1,3,H,W) the image of the fit -> (1,5,Qh,Qw).

        Coordinates are -1 and 1 in the centres of the corner pixels of the fit; colours range over [-0.5,0.5] there.
        """
        sides = torch.tensor(fitted.shape[-2:], device=rgb.device, dtype=torch.float64)  # angles reach 2e4
        place = centre_coords(tuple(rgb.shape[-2:]), sides) * sides - 0.5  # in pixels of the fit
        coords = (2 * place / (sides - 1) - 1).to(rgb.dtype)
        low, high = fitted.amin((2, 3), keepdim=True), fitted.amax((2, 3), keepdim=True)
        colours = (rgb - low) / (high - low).clamp_min(1e-4) - 0.5
        return torch.cat([coords.movedim(-1, 0)[None], colours], dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(torch.cat([self.waves(pixels), pixels[:, 2:]], dim=1))


class Pooling(nn.Module):
    """Each feature is a mean over a window of pixels, weighted by an attention that they give themselves."""

    def __init__(self, channels: int, kernel: int, grid: tuple[int, int]):
        super().__init__()
        self.kernel, self.grid = kernel, grid
        self.attention = nn.Sequential(nn.Dropout(_DROPOUT), nn.Conv2d(channels, 1, 1))
        self.gain = nn.Parameter(1 + 0.01 * torch.randn(kernel**2, 1))
        self.bias = nn.Parameter(0.01 * torch.randn(kernel**2, 1))

    def forward(self, fine: Tensor) -> Tensor:
        """(1,N,H,W) -> (1,N,h,w)."""
        blurred = gaussian_blur(fine, [5, 5], [1.0, 1.0])
        logits = self._windows(self.attention(blurred))[:, 0]  # (1,k²,h·w)
        if self.training:
            logits = logits * (torch.rand(logits.shape[-1]) > _DROPOUT).to(logits)
        weights = (logits * self.gain + self.bias).softmax(1)
        return torch.einsum("bnkp,bkp->bnp", self._windows(blurred), weights).unflatten(2, self.grid)

    def _windows(self, x: Tensor) -> Tensor:
        """(1,N,H,W) -> (1,N,k²,h·w)."""
        (h, sy), (w, sx) = (self._span(n, cells) for n, cells in zip(x.shape[-2:], self.grid, strict=True))
        found = F.unfold(x[..., :h, :w], self.kernel, stride=(sy, sx))
        return found.unflatten(1, (x.shape[1], -1))

    def _span(self, pixels: int, cells: int) -> tuple[int, int]:
        """Of one axis: how many pixels the windows cover, and the distance from one to the next."""
        stride = (pixels - self.kernel) // max(1, cells - 1) or 1
        return self.kernel + (cells - 1) * stride, stride


class Scale(nn.Module):
    """The deviation that the loss expects of each feature: where views disagree, it weighs less."""

    def __init__(self, components: int):
        super().__init__()
        self.conv = nn.Conv2d(components, 1, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter *= 0.1

    def forward(self, targets: Tensor) -> Tensor:
        return (self.conv(targets) + 0.1).exp().clamp_min(1e-4)


def step(network: Network, pool: Pooling, scale: Scale, rgb: Tensor, moves: Tensor, targets: Tensor) -> float:
    """Gradients of the losses for (1,3,H,W), (N,2,3) moves and (N,D,h,w) targets -> their sum.

    The views are taken one by one, so that memory holds the windows of one.
    """
    fine = network(network.pixels(rgb, rgb))  # (1,D,H,W)
    leaf = fine.detach().requires_grad_()
    both = torch.cat([magnitude(leaf), leaf], dim=1)
    total = 0.0
    for move, target in zip(moves.split(1), targets.split(1), strict=True):
        pooled = pool(moved(both, move))  # (1,1+D,h,w)
        loss = view_loss(pooled, target, scale(target)) / len(moves)
        loss.backward(retain_graph=True)  # `both` is one for all views
        total += loss.item()
    loss = _MAGNITUDE_VARIATION * variation(both[:, :1]) + _BLUR * blur_loss(leaf)
    loss.backward()
    fine.backward(leaf.grad)
    return total + loss.item()


def view_loss(pooled: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Squared error in units of the expected deviation, and that of magnitudes: pooled, and of what is pooled."""
    output, expected = pooled[:, 1:], magnitude(target)
    error = ((output - target).square() / (2 * scale**2) + scale.log()).mean()
    magnitudes = (pooled[:, :1] - expected).square().mean() + (magnitude(output) - expected).square().mean()
    return error + _MAGNITUDE * magnitudes


def magnitude(x: Tensor) -> Tensor:
    """(B,N,h,w) -> (B,1,h,w)."""
    return x.square().sum(1, keepdim=True).clamp_min(1e-12).sqrt()


def variation(x: Tensor) -> Tensor:
    """Squared differences of neighbours, summed and divided by the number of values."""
    return (x.diff(dim=2).square().sum() + x.diff(dim=3).square().sum()) / x.numel()


def blur_loss(x: Tensor) -> Tensor:
    """Mean squared difference from the blurred."""
    return (gaussian_blur(x, [5, 5], [1.0, 1.0]) - x).square().mean()


def drawn_moves(num: int, size: tuple[int, int]) -> Tensor:
    """(num,2,3) random views, as for `F.affine_grid`: zoomed in up to 1.8 times, up to 30 pixels out, or mirrored."""
    zoom = 1 + (_MOST_ZOOM - 1) * torch.rand(num)
    moves = torch.zeros(num, 2, 3)
    for axis, side in enumerate((size[1], size[0])):  # x, y
        room = 1 + 2 * _MOST_PAD / side - 1 / zoom  # of the window's centre to both sides, in half images
        moves[:, axis, 2] = room * (2 * torch.rand(num) - 1)
        moves[:, axis, axis] = 1 / zoom
    moves[:, 0, 0] *= 1 - 2 * (torch.rand(num) < 0.5).float()
    return moves


def moved(x: Tensor, moves: Tensor) -> Tensor:
    """(1,N,H,W), (V,2,3) -> (V,N,H,W) views, mirrored at the borders."""
    grid = F.affine_grid(moves, [len(moves), *x.shape[1:]], align_corners=False)
    return F.grid_sample(x.expand(len(moves), -1, -1, -1), grid, padding_mode="reflection", align_corners=False)


def principal_axes(features: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(V,C,h,w) -> (C,) mean, (C,D) the D <= C directions of most variance."""
    flat = features.movedim(1, -1).flatten(0, -2)  # (V·h·w,C)
    mean = flat.mean(0)
    _, axes = torch.linalg.eigh((flat - mean).T @ (flat - mean))  # in ascending order
    return mean, axes[:, -min(components, len(mean)):].flip(1)  # fmt: skip
