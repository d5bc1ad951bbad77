"""A disk cache of frozen encoders' features: one file for each image and view.

The key is a digest of the encoder's weights, its code and the input pixels, so a stale entry is never found. An entry
is written to a temporary file and renamed, so concurrent runs may share a folder; at worst they compute the same entry
twice. Each entry carries a checksum. A damaged entry is deleted and computed again.
"""

import hashlib
import logging
import os
import time
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.backbones import Backbone
from experiments.atomic import CannotWrite, replacing
from experiments.data.source_digest import encoder_version
from experiments.errors import Told
from experiments.settings import SettingError, check_writable

log = logging.getLogger(__name__)

_SWEEP_EVERY = 256  # entries written between two checks of the folder's size
_ABANDONED_S = 3600  # a half-written entry older than this belongs to a killed process


class NotFinite(Told, ValueError):
    """NaN or infinite numbers, with which training or evaluation cannot go on."""


class FeatureCache:
    """A folder of features.

    Args:
        folder: made when missing. None: nothing is kept.
        max_gb: when the folder is larger, the least recently used entries are removed.

    Raises:
        SettingError: the folder cannot be written to.
    """

    def __init__(self, folder: str | Path | None, max_gb: float = 10.0):
        if max_gb <= 0:
            raise SettingError(f"cache.max_gb must be positive, got {max_gb}")
        self.folder = None if folder is None else Path(folder).expanduser()
        self.max_bytes = int(max_gb * 1e9)
        self.hits = self.misses = 0
        self._written, self._writes = 0, True
        if self.folder is not None:
            check_writable(self.folder, "cache.folder")

    def encode(self, backbone: Backbone, images: Tensor, names: list[str]) -> Tensor:
        """(N,3,H,W) RGB in [0,1] -> (N,C,h,w) features, from the cache where it has them. Without gradients.

        Entries are stored in half precision. Computed features are rounded to it too, and each image is encoded alone.
        So the result is the same, bit for bit, whether a feature was found or computed, whether there is a folder,
        which images are asked for together, and whether the caller is under autocast.

        Raises:
            NotFinite: the encoder gave NaN, or numbers too large for half precision; names backbone and image.
        """
        identity = "" if self.folder is None else fingerprint(backbone)
        found = []
        for image, name in zip(images, names, strict=True):
            # One by one: in a batch, the last bits of an image would depend on the others.
            place = self._place(identity, image) if self.folder is not None else None
            features = self._read(place) if place else None
            self.hits, self.misses = self.hits + (features is not None), self.misses + (features is None)
            if features is None:
                features = self._compute(backbone, image[None], name)
                if place:
                    self._write(place, features)
            found.append(features.to(images.device).float())
        return torch.stack(found)  # (N,C,h,w)

    def _compute(self, backbone: Backbone, image: Tensor, name: str) -> Tensor:
        """(1,3,H,W) -> (C,h,w) in half precision; an autocast around the call has no effect."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            features = backbone(image)[0].half()  # (C,h,w)
        if not torch.isfinite(features).all():
            raise NotFinite(
                f"backbone {backbone.name} gives features that are NaN, or too large for half precision (65504), for "
                f"{name}"
            )
        return features

    def _place(self, identity: str, image: Tensor) -> Path:
        pixels = image.detach().cpu().contiguous()
        digest = hashlib.sha256(identity.encode() + repr(tuple(image.shape)).encode() + pixels.numpy().tobytes())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, place: Path) -> Tensor | None:
        try:
            with safe_open(place, "pt") as file:
                features, checksum = file.get_tensor("features"), (file.metadata() or {}).get("crc32")
            if checksum == _checksum(features):
                with suppress(OSError):  # removed just now, say; an empty file must not be made in its place
                    os.utime(place)  # marks it as just used, so that it is removed later than others
                return features
            reason = "its checksum is wrong"
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            reason = str(error)
        log.warning("the cached features %s are damaged (%s) and are computed again", place, reason)
        place.unlink(missing_ok=True)
        return None

    def _write(self, place: Path, features: Tensor) -> None:
        if not self._writes:
            return
        features = features.cpu().contiguous()
        try:
            with replacing(place) as part:
                save_file({"features": features}, part, {"crc32": _checksum(features)})
        except CannotWrite as error:  # a full disk must not end a training that needs no cache
            log.error("computed features are no longer cached: %s", error)
            self._writes = False
            return
        self._written += 1
        if self._written % _SWEEP_EVERY == 1:
            self.sweep()

    def sweep(self) -> None:
        """Removes the entries used longest ago until the folder is within its bound; other runs may do the same.

        What killed processes left half-written goes too.
        """
        for part in self.folder.glob("*/.*.part"):
            with suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > _ABANDONED_S:
                    part.unlink()
        entries = []
        for path in self.folder.glob("*/*.safetensors"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            entries.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in entries) - self.max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


class CachedBackbone:
    """A backbone whose features come from a cache; called like the backbone, without gradients.

    Args:
        shown: the name of the images in errors.
    """

    def __init__(self, backbone: Backbone, cache: FeatureCache, shown: str):
        self.name, self.backbone = backbone.name, backbone
        self._cache, self._shown = cache, shown

    def __call__(self, rgb: Tensor) -> Tensor:
        return self._cache.encode(self.backbone, rgb, [self._shown] * len(rgb))  # (N,C,h,w)

    def instead(self, backbone: Backbone) -> "CachedBackbone":
        """Another backbone with the same cache."""
        return CachedBackbone(backbone, self._cache, self._shown)


def fingerprint(backbone: Backbone) -> str:
    """Digest of a backbone: its name, layer, normalisation, every weight, and the code that runs it.

    What is called like a backbone and is none has a method `fingerprint` of its own.
    """
    if hasattr(backbone, "fingerprint"):
        return backbone.fingerprint()
    known = backbone.__dict__.get("_fingerprint")
    if known is None:
        digest = hashlib.sha256(f"{backbone.name}/{backbone.default_layer}/{backbone.mean}/{backbone.std}".encode())
        digest.update(encoder_version().encode())
        for name, tensor in sorted(backbone.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        known = backbone._fingerprint = digest.hexdigest()
    return known


def _checksum(features: Tensor) -> str:
    return f"{zlib.crc32(features.contiguous().numpy().tobytes()):08x}"
