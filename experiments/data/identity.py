"""What results depend on besides code (`code_version`): settings, files that they name, and data sets, as digests."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from core import checkpoint
from core.weight_files import content_digest
from experiments.data.base import DataSet, data_sets, open_data
from experiments.data.code_version import code_of_user
from experiments.settings import one_number


def digest_of(values: Mapping[str, object]) -> str:
    """Hexadecimal digest of JSON values."""
    return hashlib.sha256(json.dumps(one_number(values), sort_keys=True).encode()).hexdigest()


def fingerprint_of(data: DictConfig) -> str:
    """Fingerprint of the data set of a configuration node, which is opened once per sweep.

    Raises:
        DataError: as `open_data`.
    """
    return _known(data)[0]


def names_of(data: DictConfig) -> frozenset[str]:
    """Names of all samples of a data set; raises as `fingerprint_of`."""
    return _known(data)[1]


def files_of(settings: object) -> dict[str, str]:
    """Files named in settings (weights to start from, an encoder's): path or name -> digest of the content."""
    if isinstance(settings, Mapping):
        return {path: known for value in settings.values() for path, known in files_of(value).items()}
    if isinstance(settings, list):
        return {path: known for value in settings for path, known in files_of(value).items()}
    if isinstance(settings, str) and settings in checkpoint.BUNDLED:
        # published weights never change, so their name is enough
        return {settings: content_digest(checkpoint.BUNDLED[settings])}
    if isinstance(settings, str) and settings and Path(settings).expanduser().is_file():
        return {settings: content_digest(Path(settings).expanduser())}
    return {}


def forget_data() -> None:
    """Opens data sets again when they are next asked for: in a long process their files may have changed."""
    _known_of.cache_clear()


def _known(data: DictConfig) -> tuple[str, frozenset[str]]:
    node = json.dumps(OmegaConf.to_container(data, resolve=True, enum_to_str=True))
    return _known_of(node, data_sets().get(data.name))


@cache
def _known_of(node: str, cls: type[DataSet] | None) -> tuple[str, frozenset[str]]:
    data = open_data(json.loads(node))
    own = code_of_user(cls)
    return f"{data.fingerprint} {own}".rstrip(), frozenset(data.names)
