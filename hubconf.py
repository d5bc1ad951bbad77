"""torch.hub entry points: `torch.hub.load("owner/repository", "anyup")`."""

dependencies = ["huggingface_hub", "hydra", "omegaconf", "safetensors", "torch"]

import warnings  # noqa: E402

from anyup_lab import core, extensions  # noqa: E402, F401  beside any other module called core

SCRATCH = "scratch"


def anyup(checkpoint: str | None = None, overrides: list[str] | None = None) -> core.AnyUp:
    """AnyUp in eval mode: the trained baseline of this package, a variant that starts from it, or a checkpoint.

    Args:
        checkpoint: a file or a name that `core.load` takes. None: the trained baseline. "scratch": untrained weights.
        overrides: Hydra overrides that define a variant. It starts from the trained baseline's weights; a warning names
            the weights that the baseline does not have. With "scratch" all weights are untrained.

    Raises:
        ValueError: overrides together with a checkpoint, which has its own configuration; or the trained baseline's
            weights do not fit the variant. Otherwise as `core.load` or `core.build`.
    """
    if checkpoint == SCRATCH:
        return core.build(overrides).eval()
    if not overrides:
        return core.AnyUp.from_pretrained() if checkpoint is None else core.load(checkpoint)
    if checkpoint is not None:
        raise ValueError("give a checkpoint or overrides, not both; core.warm_start copies weights to another variant")
    model = core.build(overrides)
    try:
        new = core.warm_start(model, core.checkpoint.bundled_like(model))
    except core.WeightsError as error:
        raise ValueError(f'{error}. checkpoint="{SCRATCH}" gives untrained weights') from error
    if new:
        warnings.warn(f"untrained weights, because the trained baseline has none: {', '.join(new)}", stacklevel=2)
    return model.eval()


def anyup_paper() -> core.AnyUp:
    """The paper's model with its published weights (Wimmer et al., CC-BY-4.0; downloads 3.5 MB)."""
    return core.AnyUp.from_pretrained("anyup_paper")


def anyup_multi_backbone() -> core.AnyUp:
    """The published model trained on five backbones (Wimmer et al., CC-BY-4.0; downloads 3.5 MB)."""
    return core.AnyUp.from_pretrained("anyup_multi_backbone")
