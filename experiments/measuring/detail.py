"""Detail: what a fine grid of features shows beyond the coarse grid it was upsampled from.

Cosine and squared error reward blur: features of one crop are noisy, and a blurred output agrees better with noise
(docs/evidence.md). Of output and target everything is taken away that the coarse grid can carry, `core.detail.detail`,
and what is left is correlated over the image and all channels. How strong the detail is plays no part. Blurring an
output whose detail is mostly right takes away what is right before it takes away what is wrong. Where it is mostly
wrong, the correlation rises; so `task=fidelity` has a blurred control for detail too.
"""

from collections.abc import Mapping

from torch import Tensor

from core.detail import detail, octaves


def agreement(ours: Tensor, target: Tensor, where: Tensor | None = None) -> dict[str, float]:
    """How the detail of an output agrees with that of the target, each (1,C,H,W) in float64 or converted to it.

    Args:
        where: (H,W) bool, the positions that count; None: all.

    Returns:
        correlation: of the two over positions and channels, about zero, which is detail's mean: 1 is perfect whatever
            the amplitude; 0 where the output has none.
        unexplained: squared error at the output's best amplitude, in units of the target's energy: 1 - correlation²
            where the correlation is positive, else 1: no positive amplitude helps.
        amplitude: root of the output's energy over the target's.
        Empty where the target has no detail.
    """
    ours, target = (x.detach().double().cpu()[0] for x in (ours, target))  # (C,H,W)
    if where is not None:
        ours, target = ours[:, where], target[:, where]
    product, own, wanted = ((a * b).sum().item() for a, b in ((ours, target), (ours, ours), (target, target)))
    if wanted <= 0:
        return {}
    correlation = product / (own * wanted) ** 0.5 if own > 0 else 0.0
    return {
        "correlation": correlation,
        "unexplained": 1 - max(correlation, 0.0) ** 2,
        "amplitude": (own / wanted) ** 0.5,
    }


def detail_measures(
    ours: Tensor, target: Tensor, grid: tuple[int, int], edges: Tensor | None = None, counted: Tensor | None = None
) -> Mapping[str, float]:
    """All measures of detail of one image: overall, near image edges, and per octave where there are several.

    Args:
        ours, target: (1,C,H,W). grid: (h,w) of the low-resolution features.
        edges, counted: (H,W) bool: positions near edges, and positions that count at all; None: all.

    Returns:
        detail, detail_error, detail_amplitude; edge_detail; detail_1x-2x, ... (`agreement`'s correlation).
    """
    ours, target = ours.detach().double(), target.detach().double()
    fine, wanted = detail(ours, grid), detail(target, grid)
    found = agreement(fine, wanted, counted)
    measured = {
        name: found[key]
        for name, key in (
            ("detail", "correlation"),
            ("detail_error", "unexplained"),
            ("detail_amplitude", "amplitude"),
        )
        if key in found
    }
    edges = edges if edges is None or counted is None else edges & counted
    if edges is not None and edges.any():
        near = agreement(fine, wanted, edges)
        measured |= {"edge_detail": near["correlation"]} if near else {}
    bands = octaves(ours, grid), octaves(target, grid)
    if len(bands[0]) > 1:
        for name, band in bands[0].items():
            own = agreement(band, bands[1][name], counted)
            measured |= {f"detail_{name}": own["correlation"]} if own else {}
    return measured
