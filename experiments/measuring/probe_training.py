"""How probes are trained, on whole images or on drawn pixels.

`pixels_per_image=null` is the published protocol: each step upsamples its images, mirrored at random, and all pixels
count. With a number that many labelled pixels are drawn from each training image, upsampled once (AnyUp: at those
pixels only), and kept in half precision (in memory only). The probe is trained on those: as many steps, many times
faster, nothing mirrored.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from core.streams import generator, named_stream
from experiments.measuring.bench import Bench, EncodedImage, EvaluationError
from experiments.measuring.heads import HEADS, at_positions
from experiments.measuring.probe import Probe, ProbeSettings
from experiments.measuring.readout import at_pixels
from experiments.peers.interpolation import Bilinear
from experiments.progress import Progress

Batch = tuple[list[Tensor], Tensor]
"""Features of each layer, and targets."""


def train_probe(task: Probe, model: nn.Module | None, scale: int, seed: int, bench: Bench) -> nn.Module:
    """Trains a head on the features that `model` upsamples; initial weights and batches depend on the seed alone.

    Args:
        model: None: on low-resolution features as they are, with the targets of whole cells (`Probe.of_cells`).
        scale: of the encoder's input; more than 1 for the ceiling.

    Raises:
        EvaluationError: nothing to learn from, a loss that is not finite, or as `Bench.upsample`.
    """
    settings, usable = task.settings, task.usable(bench.train)
    num_steps = -(-len(usable) // settings.batch_size) * settings.epochs
    widths = [layer.shape[1] for layer in bench.train.get(usable[0], scale=scale).features]
    with named_stream(seed, f"probe/{task.choice}"):
        outputs = task.outputs(bench)
        head = HEADS[settings.head].make(widths, outputs, settings.hidden)
    head.to(bench.device)
    enlarge = model is not None and settings.pixels_per_image is None
    if model is None:
        batches = _cells(task, seed, bench)
    else:
        batches = (_whole if enlarge else _drawn)(task, model, scale, seed, bench)
    adam = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    for step, (features, target) in enumerate(Progress(batches, f"probe of {task.choice}", "step", num_steps)):
        adam.param_groups[0]["lr"] = settings.rate(step, num_steps)
        prediction = task.predict(head(features), bench) if enlarge else task.decode(head(features))
        loss = task.loss(prediction, target)
        if not torch.isfinite(loss):
            raise EvaluationError(f"the loss of the probe became {loss.item()} in step {step} of {num_steps}")
        adam.zero_grad()
        loss.backward()
        adam.step()
    return head.eval()


def features_for(commutes: bool, model: nn.Module, cases: list[EncodedImage], bench: Bench) -> list[Tensor]:
    """What a head is given: upsampled features, (B,C,Qh,Qw) of each layer.

    To a head that commutes with bilinear interpolation, of `bilinear` the low-resolution ones: `Probe.predict` enlarges
    what comes out, which is the same and many times cheaper.
    """
    if isinstance(model, Bilinear) and commutes:
        return [torch.cat(layers).float() for layers in zip(*(case.features for case in cases), strict=True)]
    return bench.upsample(model, cases)


def _batches(usable: list[int], settings: ProbeSettings, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, positions in `usable`) of each step; each epoch is another permutation."""
    for epoch in range(settings.epochs):
        order = torch.randperm(len(usable), generator=generator(seed, "probe order", epoch))
        for chosen in order.split(settings.batch_size):
            yield epoch, chosen.tolist()


def _whole(task: Probe, model: nn.Module, scale: int, seed: int, bench: Bench) -> Iterator[Batch]:
    """Batches of whole images, upsampled on the way."""
    usable, settings = task.usable(bench.train), task.settings
    for epoch, chosen in _batches(usable, settings, seed):
        flips = torch.rand(len(usable), generator=generator(seed, "probe flip", epoch)) < settings.flip
        cases = [bench.train.get(usable[i], bool(flips[i]), scale) for i in chosen]
        yield (
            features_for(settings.commutes, model, cases, bench),
            torch.cat([task.target(case) for case in cases]),
        )


def _cells(task: Probe, seed: int, bench: Bench) -> Iterator[Batch]:
    """Batches of low-resolution features, with one target for each cell."""
    usable = task.usable(bench.train)
    for _, chosen in _batches(usable, task.settings, seed):
        cases = [bench.train.get(usable[i]) for i in chosen]
        features = features_for(True, Bilinear(), cases, bench)  # (B,C,h,w)
        size = tuple(features[0].shape[-2:])
        yield features, torch.cat([task.of_cells(task.target(case), size) for case in cases])


def _drawn(task: Probe, model: nn.Module, scale: int, seed: int, bench: Bench) -> Iterator[Batch]:
    """Batches of drawn pixels, as images of P rows and one column."""
    usable, settings = task.usable(bench.train), task.settings
    features, targets = [], []
    for i in Progress(usable, "pixels", "image"):
        case = bench.train.get(i, scale=scale)
        target = task.target(case)
        positions = _positions(task.known(target)[0], settings.pixels_per_image, (seed, "probe pixels", case.name))
        features.append(at_pixels(model, case, positions, bench).half())  # (C,P)
        targets.append(at_positions(target, positions, bench.sizes.image))  # (K,P)
        if not torch.isfinite(features[-1]).all():
            raise EvaluationError(f"image {case.name}: upsampled features are too large for half precision (65504)")
    features, targets = torch.stack(features), torch.stack(targets)  # (N,C,P), (N,K,P)
    for _, chosen in _batches(usable, settings, seed):
        yield [features[chosen].float()[..., None]], targets[chosen][..., None]  # (B,C,P,1), (B,K,P,1)


def _positions(known: Tensor, count: int, key: tuple[object, ...]) -> Tensor:
    """(H,W) bool -> (count,2) rows and columns of known pixels; of fewer than `count`, each may come repeatedly."""
    places = known.nonzero()  # (K,2)
    if len(places) >= count:
        chosen = torch.randperm(len(places), generator=generator(*key))[:count]
    else:
        chosen = torch.randint(len(places), (count,), generator=generator(*key))
    return places[chosen.to(places.device)]
