"""What a file of trained weights of a peer says of its settings: metadata of the safetensors format."""

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FORMAT = "anyup_lab_peer/1"


def recorded_as(name: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a trained peer: its name and all its settings but the file that its training started from."""
    kept = {key: _plain(value) for key, value in settings.items() if key != "weights"}
    return {"format": FORMAT, "peer": json.dumps({"name": name, **kept})}


def settings_of(path: Path) -> dict[str, Any] | None:
    """{"name": NAME, SETTING: VALUE, ...} of the peer in a file; None: it says nothing, or cannot be read."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError:  # who reads the weights says what is wrong
        return None
    return json.loads(metadata["peer"]) if metadata.get("format") == FORMAT else None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return value.name if isinstance(value, Enum) else value
