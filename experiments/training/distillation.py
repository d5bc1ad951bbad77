"""Distillation of a shallow vision transformer from a deeper one of timm: the recipe of `backbone=embedded`.

The student is the teacher's architecture with fewer blocks, and starts as some of the teacher's own blocks. It learns
to give the teacher's final features (normalised tokens, class token dropped) of random views of photographs: cosine
plus squared error in units of the teacher's spread (Hinton et al., arXiv 1503.02531, for the idea; Sanh et al.,
arXiv 1910.01108, for starting from every n-th block).
"""

import copy
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from core.backbones import Backbone, backbone_from_config, normalize
from experiments.atomic import replacing
from experiments.data import DataSet, open_data
from experiments.progress import Progress
from experiments.settings import SettingError, pick_device
from experiments.tracking.store import Run, track

log = logging.getLogger(__name__)


def distill(config: DictConfig) -> Path:
    """Trains the student of `config` (configs/distill.yaml) and writes its weights, in half precision.

    Returns:
        The file, with timm's parameter names: `backbone.weights=` takes it.

    Raises:
        SettingError: the teacher is no ViT with the wanted blocks. Otherwise as the data, the teacher and tracking.
    """
    device = pick_device(config.device)
    data = open_data(config.data)
    try:
        teacher = backbone_from_config(config.backbone).to(device)
    except ValueError as error:  # no such backbone, or weights of another
        raise SettingError(str(error)) from error
    with track(config, device) as run:
        run.tag("data.fingerprint", data.fingerprint)
        student = student_of(teacher, list(config.blocks)).to(device)
        _train(student, teacher, data, config, device, run)
        target = Path(config.out)
        with replacing(target) as part:
            save_file({key: value.half().contiguous() for key, value in student.state_dict().items()}, part)
        run.file(target)
    return target


def student_of(teacher: Backbone, blocks: list[int]) -> nn.Module:
    """A copy of the teacher's trunk with only those of its blocks.

    Raises:
        SettingError: it has no such blocks.
    """
    trunk = getattr(teacher, "trunk", None)
    known = getattr(trunk, "blocks", ())
    if not blocks or not set(blocks) <= set(range(len(known))):
        raise SettingError(f"blocks={blocks} must name some of the {len(known)} blocks of backbone {teacher.name}")
    student = copy.deepcopy(trunk)
    student.blocks = nn.Sequential(*(student.blocks[i] for i in blocks))
    return student.requires_grad_(True).train()


def tokens(trunk: nn.Module, image: Tensor) -> Tensor:
    """(B,3,H,W) normalised -> (B,hw,C): the final normalised tokens without class token and registers."""
    return trunk.forward_features(image)[:, trunk.num_prefix_tokens :]


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(B,N,C) both -> scalar: 1 - cosine, plus squared error over the variance of each teacher channel."""
    spread = teacher.flatten(0, 1).var(0) + 1e-6  # (C,)
    squared = ((student - teacher).square() / spread).mean()
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean() + 0.5 * squared


def augmentation(size: int) -> v2.Transform:
    """Random resized crop, flip and colour jitter: (3,H,W) RGB in [0,1] -> (3,size,size)."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.3, 0.1)], p=0.5),
            v2.RandomGrayscale(0.1),
        ]
    )


def _train(
    student: nn.Module, teacher: Backbone, data: DataSet, config: DictConfig, device: torch.device, run: Run
) -> None:
    torch.manual_seed(config.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config.warmup, config.steps))
    photographs = [sample.image for sample in Progress(data, "reading", "image")]
    batches = _batches(photographs, list(config.sizes), config.batch_size)
    started = time.perf_counter()
    progress = Progress(range(config.steps), "distilling")
    for step in progress:
        image = normalize(next(batches).to(device), teacher.mean, teacher.std)  # (B,3,S,S)
        with torch.no_grad():
            wanted = tokens(teacher.trunk, image)
        loss = distillation_loss(tokens(student, image), wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        rate.step()
        progress.note = f"loss {loss.item():.4f}"
        if step % config.log_every == 0:
            run.metrics({"distillation_loss": loss.item(), "lr": rate.get_last_lr()[0]}, step)
            log.info("step %d: loss %.4f, %.0f s", step, loss.item(), time.perf_counter() - started)


def _batches(photographs: list[Tensor], sizes: list[int], batch_size: int) -> Iterator[Tensor]:
    """Augmented photographs without end, (B,3,S,S) RGB in [0,1], S drawn for each batch; all are seen equally often."""
    order = torch.randperm(len(photographs)).tolist()
    while True:
        augment = augmentation(sizes[int(torch.randint(len(sizes), ()))])
        while len(order) < batch_size:
            order += torch.randperm(len(photographs)).tolist()
        picked, order = order[:batch_size], order[batch_size:]
        yield torch.stack([augment(photographs[i]) for i in picked]).clamp(0, 1)


def _rate(step: int, warmup: int, steps: int) -> float:
    """Share of the learning rate: a linear rise, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
