"""A training's state on disk: one safetensors file that holds everything the next step depends on, or nothing."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from core.batch import Batch
from core.weight_files import WeightsError, read_weights
from experiments.atomic import replacing
from experiments.settings import SettingError

STATE_NAME = "state.safetensors"
FORMAT = "2"
"""Of the names of the tensors."""


class ChangedConfig(SettingError):
    """A training would be resumed with other settings than it was started with."""


@dataclass
class State:
    """Where a training stands, besides its tensors."""

    step: int = 0
    """Steps done."""
    best: float | None = None
    """Best validation result so far."""
    run_id: str = ""
    """Of the tracked run that a resumed training continues."""
    seconds: float = 0.0
    """Spent in steps so far, all sessions together."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """Of half-precision training."""
    losses: dict[str, float] = field(default_factory=dict)
    """Of the latest step."""
    validation: dict[str, float] = field(default_factory=dict)
    """Of the latest validation; empty without any."""


def save_state(path: Path, state: State, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Writes the state, atomically.

    Raises:
        CannotWrite: full disk or missing rights; the earlier state is untouched.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        described = {"state": json.dumps(asdict(state)), "config": json.dumps(config, sort_keys=True)}
        save_file(kept, part, {"format": FORMAT} | described)


def load_state(path: Path, config: dict[str, Any], extend: bool = False) -> tuple[State, dict[str, Tensor]]:
    """Reads the state of a training with these settings.

    Args:
        extend: `steps` may be more than it was started with, where that leaves the steps done as they are.

    Raises:
        WeightsError: the file is damaged, or no such state.
        ChangedConfig: it was made with other settings; names them with both values.
    """
    state, made_with, tensors = read_state(path)
    before, now = _flat(made_with), _flat(json.loads(json.dumps(config)))
    differ = [key for key in before.keys() | now.keys() if before.get(key, "absent") != now.get(key, "absent")]
    differ.sort(key=lambda key: (not key.startswith("peer."), key))  # another model says most
    changed = [f"{key}={now.get(key, 'absent')} (was {before.get(key, 'absent')})" for key in differ]
    if differ == ["steps"]:
        refusal = _against_more_steps(state.step, made_with, config["steps"], extend)
        if refusal:
            raise ChangedConfig(
                f"{path} was made with other settings: {changed[0]}. {refusal}. Or restore it, or start anew with "
                "resume=never or another out_dir; to start a new training from its weights alone, use "
                f"init_from={path.with_name('last.safetensors')}"
            )
    elif changed:
        raise ChangedConfig(
            f"{path} was made with other settings: {', '.join(changed[:8])}{', ...' if len(changed) > 8 else ''}. "
            "Restore them, or start anew with resume=never or another out_dir; to continue from its weights alone, "
            f"use init_from={path.with_name('last.safetensors')}"
        )
    return state, tensors


def read_state(path: Path) -> tuple[State, dict[str, Any], dict[str, Tensor]]:
    """Reads any training's state -> where it stands, the settings it was made with, and its tensors.

    Raises:
        WeightsError: the file is damaged, or no such state.
    """
    try:
        tensors, metadata = read_weights(path)
    except WeightsError as error:
        raise WeightsError(
            f"{error}. It holds a training's state: delete it, or train with resume=never; the weights of the last "
            f"checkpoint are in {path.with_name('last.safetensors')} (init_from=... starts from them)"
        ) from error
    if "state" not in metadata or "config" not in metadata:
        raise WeightsError(f"{path} is no state of a training")
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path} was made by another version of this package: start anew with resume=never or another out_dir; to "
            f"continue from its weights alone, use init_from={path.with_name('last.safetensors')}"
        )
    return State(**json.loads(metadata["state"])), json.loads(metadata["config"]), tensors


def save_batch(path: Path, batch: Batch, names: list[str], losses: dict[str, float]) -> None:
    """Keeps the batch on which a training failed, atomically: its tensors, and names and losses as metadata.

    Raises:
        CannotWrite: full disk or missing rights.
    """
    tensors = {
        "image": batch.image,
        "augmented_image": batch.augmented_image,
        "features": batch.features,
        "target": batch.target,
        "corners": batch.corners,
        "whole": batch.whole,
        "crops": batch.crops,
        "high_resolution": batch.high_resolution,
    }
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    with replacing(path) as part:
        save_file(kept, part, {"names": "\n".join(names), "losses": str(losses)})


def _against_more_steps(done: int, made_with: dict[str, Any], steps: int, extend: bool) -> str:
    """Why a training after `done` steps cannot go on to another number of them; empty: it can, bit for bit."""
    before, optimiser = made_with["steps"], made_with["optimiser"]
    if steps < before:
        return f"Fewer steps are stop_after={steps}"
    if optimiser["schedule"] != "constant":
        return (
            f"It cannot be extended: the learning rate of optimiser.schedule={optimiser['schedule']} falls to zero at "
            f"step {before}, so with more steps all of them would have been others; only constant can be extended"
        )
    last_group = before - before % optimiser["accumulate"]  # accumulates fewer steps than the others
    if done > last_group:
        return (
            f"It cannot be extended: its steps from {last_group} on were one update, as the last ones, and not "
            f"optimiser.accumulate={optimiser['accumulate']}"
        )
    return "" if extend else f"extend=true lets it go on to step {steps}, for its schedule is constant"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix.rstrip("."): values}
    return {name: value for key, inner in values.items() for name, value in _flat(inner, f"{prefix}{key}.").items()}
