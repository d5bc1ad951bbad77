"""torch.hub entry points: `torch.hub.load("owner/repository", "anyup", checkpoint="model.safetensors")`."""

dependencies = ["huggingface_hub", "hydra", "omegaconf", "safetensors", "torch"]

import torch  # noqa: E402

import core  # noqa: E402

PUBLISHED = {
    "anyup_paper": "https://github.com/wimmerth/anyup/releases/download/checkpoint/anyup_paper.pth",
    "anyup_multi_backbone": "https://github.com/wimmerth/anyup/releases/download/checkpoint_v2/anyup_multi_backbone.pth",
}
"""Weights published by AnyUp's authors (CC-BY-4.0), trained on DINOv2 ViT-S/14, and on five backbones."""


def anyup(checkpoint: str | None = None, overrides: list[str] | None = None) -> core.AnyUp:
    """AnyUp from a checkpoint file (ours, or a published one), or with fresh weights and Hydra `overrides`.

    Raises:
        ValueError: both are given: a checkpoint carries its own configuration.
    """
    if checkpoint is not None and overrides:
        raise ValueError("give a checkpoint or overrides, not both; core.warm_start puts weights into another variant")
    return core.build(overrides).eval() if checkpoint is None else core.load(checkpoint)


def anyup_paper() -> core.AnyUp:
    """The paper's model with its published weights (downloads 3.5 MB)."""
    return _published("anyup_paper")


def anyup_multi_backbone() -> core.AnyUp:
    """The published model trained on five backbones (downloads 3.5 MB)."""
    return _published("anyup_multi_backbone")


def _published(name: str) -> core.AnyUp:
    state = torch.hub.load_state_dict_from_url(PUBLISHED[name], map_location="cpu", weights_only=True)
    return core.from_published(state)
