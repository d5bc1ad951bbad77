"""The benchmark's arms at one size, with the same weights.

`dense` is the released algorithm, `ours` and `compiled` are this project's. `head` upsamples the features and applies a
linear head to them, `readout` gives the same classes by `AnyUp.readout`. Peers (`experiments.peers`) go by their names;
they compute something else, with new weights where they have any.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

import core
from core.batch import Batch
from core.compose import build_filler
from core.encoder import Encoder
from core.published import rename_published
from core.reference import ReferenceAnyUp, reference_of
from core.registry import signature_fields
from core.rotary import Rotary
from core.streams import named_stream
from core.training import Trainable
from core.unifiers import BasisConvolution
from experiments.cost.benchmark_cases import READOUT_ARMS, Case, queries_at_once
from experiments.cost.measure import count_flops
from experiments.peers import CannotUpsample, Peer, peer_from_config, peers
from experiments.settings import DTYPES, SettingError

ENCODERS = {192: "vit_tiny16", 384: "vit_small16", 768: "vit_base16"}
"""C -> the encoder of peers that run theirs."""


@dataclass
class PreparedArm:
    """One implementation with its inputs, ready to be measured at one size."""

    call: Callable[[], object]
    """What is timed."""
    outcome: Callable[[], Tensor]
    """Calls it once -> what all arms must agree on: the output, or the gradient of all weights, (N,1)."""


def make_batch(case: Case, device: torch.device) -> Batch:
    """Made-up inputs, the same for every arm: smooth, with channels of unlike means, as images and features are."""
    generator = torch.Generator().manual_seed(0)

    def smooth(channels: int, side: int) -> Tensor:
        means = torch.randn(1, channels, 1, 1, generator=generator)
        coarse = means + torch.randn(case.batch, channels, 3, 3, generator=generator)
        return F.interpolate(coarse, (side, side), mode="bilinear").to(device, dtype)  # (B,channels,side,side)

    dtype = torch.float32 if case.training else DTYPES[case.dtype]
    image, augmented, features = smooth(3, case.image), smooth(3, case.image), smooth(case.channels, case.grid)
    target = smooth(case.channels, case.output if case.training else 1)
    return Batch(image, features, target, (case.output,) * 2, augmented_image=augmented)


def make_arm(name: str, case: Case, config: DictConfig, batch: Batch) -> PreparedArm:
    """Builds one of `ARM_NAMES` on the device of `batch`, with the same weights; or a peer."""
    if name in peers():
        network = bench_peer(name, case).to(batch.image.device)
        return _training_arm(network.train(), case, config, batch) if case.training else _peer_arm(network, case, batch)
    model = core.from_config(config).to(batch.image.device)
    network = model
    if name == "dense":
        network = dense_reference(model)
    elif name == "compiled":
        network = model.compile_encoders()
    if case.training:
        return _training_arm(network.train(), case, config, batch)
    network = network.to(DTYPES[case.dtype]).eval()
    if name in READOUT_ARMS:
        return _readout_arm(name == "readout", network, case, config.num_classes, batch)
    chunk = (queries_at_once(case, config, batch.image.device),) if name == "dense" else ()

    @torch.inference_mode()
    def call() -> Tensor:
        return network(batch.image, batch.features, batch.output_size, *chunk)

    return PreparedArm(call, call)


def bench_peer(name: str, case: Case) -> Peer:
    """A peer for these features, at its default settings; one that runs its encoder has a ViT/16 with new weights.

    Raises:
        SettingError: as `peer_from_config`; no such encoder has C channels.
    """
    fields = signature_fields(peers()[name])
    if "encoder" in fields:
        if case.channels not in ENCODERS:
            raise SettingError(f"peer {name} runs its encoder: C must be one of {', '.join(map(str, ENCODERS))}")
        with named_stream(0, f"peer/{name}"):
            return peers()[name](ENCODERS[case.channels], encoder_weights="random").eval()
    known = {"channels": case.channels, "any_size": True} | dict.fromkeys(peers()[name].checkpoints, "bundled")
    return peer_from_config({"peer": name, **{key: value for key, value in known.items() if key in fields}})


def _peer_arm(network: Peer, case: Case, batch: Batch) -> PreparedArm:
    network = network.to(DTYPES[case.dtype])

    @torch.no_grad()
    def call() -> Tensor:
        return network(batch.image, batch.features, batch.output_size)

    return PreparedArm(call, call)


def _readout_arm(first: bool, model: core.AnyUp, case: Case, num_classes: int, batch: Batch) -> PreparedArm:
    """A linear head with made-up weights, applied before upsampling if `first`, else after it."""
    weight = torch.randn(num_classes, case.channels, generator=torch.Generator().manual_seed(0)).to(batch.features)

    @torch.inference_mode()
    def call() -> Tensor:
        if first:
            return model.readout(batch.image, batch.features, (weight, None), batch.output_size)
        return F.conv2d(model(batch.image, batch.features, batch.output_size), weight[..., None, None])

    return PreparedArm(call, call)


def _training_arm(network: nn.Module, case: Case, config: DictConfig, batch: Batch) -> PreparedArm:
    """Forward, losses, backward, update; below float32 under autocast, with float32 weights."""
    objective, learner = (build_filler(hook, config[hook]) for hook in ("objective", "learner"))
    trainable = Trainable(network, objective, learner)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4)
    dtype, device = DTYPES[case.dtype], batch.image.device.type

    def call() -> object:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return learner.step(trainable, [batch], optimizer)

    def gradient() -> Tensor:
        call()
        return gradient_of(network)[:, None]

    return PreparedArm(call, gradient)


def gradient_of(network: nn.Module) -> Tensor:
    """The gradient of all weights after a backward, (N,): of model and reference in the same order."""
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in network.named_parameters()}
    if isinstance(network, ReferenceAnyUp):
        grads, _ = rename_published(grads)  # our names, without what nobody reads
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def dense_reference(model: core.AnyUp) -> ReferenceAnyUp:
    """The dense released algorithm with the model's weights.

    Raises:
        ValueError: the model is not the baseline.
    """
    reference = reference_of(model)
    other = [hook for hook in ("decoder", "refiner", "temporal") if model.config[hook]["name"] != "none"]
    if other:
        raise ValueError(f"the reference is the baseline only, not {other[0]}={model.config[other[0]]['name']}")
    return reference


def warmed_up(name: str, case: Case, config: DictConfig) -> Callable[[], object]:
    """Builds an arm on CPU and calls it once -> its call. What a first call costs comes only once.

    That first call is at a tiny size, unless the arm compiles for this one.
    """
    torch.set_num_threads(config.num_threads)
    tiny = replace(case, image=2 * case.patch, output=2 * case.patch)
    arm, small = (make_arm(name, size, config, make_batch(size, torch.device("cpu"))) for size in (case, tiny))
    with suppress(CannotUpsample):  # a peer that needs a larger grid
        (arm if name == "compiled" else small).call()
    return arm.call


def forward_flops(network: nn.Module, case: Case) -> int:
    """Of one forward, counted without computing it.

    Raises:
        CannotUpsample: a peer does not support this size.
    """
    for module in network.modules():
        if isinstance(module, (Encoder, Rotary, BasisConvolution)):
            module.twice_differentiable = True  # the plain operations, which can be counted
    network = network.to("meta")
    image = torch.empty(case.batch, 3, case.image, case.image, device="meta")
    features = torch.empty(case.batch, case.channels, case.grid, case.grid, device="meta")

    def count(*size: int) -> int:
        with torch.no_grad():
            return count_flops(lambda: network(image, features, size))

    if not isinstance(network, ReferenceAnyUp):
        return count(case.output, case.output)
    # Its mask would be computed after all. Its operations are an affine function of the number of queries.
    few, more = count(1, 8), count(1, 16)
    return few + (more - few) * (case.output**2 - 8) // 8
