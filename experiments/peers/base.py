"""The class of peers, and how one is registered, configured and made."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from core import checkpoint
from core.atomic import replacing
from core.registry import Choices, signature_fields
from core.streams import named_stream
from core.weight_files import WeightsError, content_digest, read_weights
from experiments.errors import Told
from experiments.peers.recorded import recorded_as, settings_of
from experiments.settings import SettingError

PeerNode = str | Mapping[str, Any] | DictConfig
"""A peer in a configuration: NAME, or `{peer: NAME, SETTING: VALUE, ...}`."""


class CannotUpsample(Told, ValueError):
    """An input that a peer does not support: its channels, the factor, a grid below its window; says which."""


class Peer(nn.Module, ABC):
    """Another method to upsample features, called like AnyUp.

    The settings are the arguments of `__init__`, each with a type. A file is a `Path`. A method with trained weights
    has the argument `weights: Path | None = None`, and reads it with `load_weights`; without, its weights are new, for
    `experiments.train`. A method made for one encoder takes C from its weights, or for new ones from an argument
    `channels: int | None = None` (`channels_of`). `__init__` may raise ValueError or OSError for values that it cannot
    use. Its initial weights depend on the seed of the training only.

    What a peer may rely on: forward is called in eval mode under `torch.no_grad()`, never under
    `torch.inference_mode()`, so a method that optimises for each image may use `torch.enable_grad()`. In training it is
    called in train mode; only then it may draw random numbers, from PyTorch's own generators.

    What a peer must keep: in eval mode equal inputs give equal outputs, and an image does not depend on the others of
    its batch. Every parameter that asks for a gradient gets one in training; for one that no output depends on,
    `requires_grad_(False)`. It refuses inputs that it does not support, by `channels`, by `factor`, or by raising
    `CannotUpsample` in forward before anything is computed.
    """

    choice: ClassVar[str]
    """The name it is registered under."""
    settings: dict[str, Any] | None = None
    """All settings, if it was made from a configuration (`peer_from_config`)."""
    channels: int | None = None
    """The number of channels C, for a peer made for one encoder; None: any."""
    linear_in_values: ClassVar[bool] = False
    """Whether each output is a weighted sum of features, with weights that sum to 1 and do not depend on the features.
    A linear head may then be applied before upsampling, to fewer values."""
    factor: int | None = None
    """How many times it enlarges the feature grid, if it has one fixed factor; None: any output size."""
    any_size: bool = False
    """For a fixed factor: whether other output sizes are made from its own output, by `resampled`. A setting."""
    optimises: ClassVar[bool] = False
    """Whether it optimises for each image. It is then measured only where it is named, as it may take minutes."""
    checkpoints: ClassVar[tuple[str, ...]] = ()
    """Settings that name a checkpoint of AnyUp, as `core.load` takes it; they count by the file's content."""
    nests: ClassVar[tuple[str, ...]] = ("state_dict", "model")
    """Keys under which its authors' files contain the state dict."""

    def __call__(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Upsamples, or refuses inputs that it does not support.

        Args:
            image, features, output_size: as for `forward`.
            generator: of the random numbers in train mode, on the CPU; None: PyTorch's own.

        Raises:
            CannotUpsample: it does not support these features or this output size.
        """
        if generator is not None:
            with torch.random.fork_rng([features.device] if features.is_cuda else []):
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
                return self(image, features, output_size)
        if self.channels is not None and features.shape[1] != self.channels:
            raise CannotUpsample(
                f"peer {self.choice} takes features of {self.channels} channels, got {features.shape[1]}: choose the "
                "backbone that it was made for"
            )
        size = tuple(image.shape[-2:]) if output_size is None else tuple(output_size)
        own = size if self.factor is None else tuple(self.factor * n for n in features.shape[-2:])
        if size == own:
            return super().__call__(image, features, output_size)
        if not self.any_size:
            other = "" if "any_size" not in signature_fields(type(self)) else ", or set any_size=true"
            raise CannotUpsample(
                f"peer {self.choice} enlarges {self.factor} times, {'x'.join(map(str, features.shape[-2:]))} features "
                f"to {'x'.join(map(str, own))}, not to {'x'.join(map(str, size))}: choose that output size{other}"
            )
        return resampled(super().__call__(image, features, own), size)

    @abstractmethod
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Upsamples as `core.AnyUp.forward` does.

        Args:
            image: (B,3,H,W), normalised with ImageNet's mean and deviation.
            features: (B,C,h,w), any C, of the same images; they tile the image, whatever h and w are.
            output_size: (Qh,Qw); the image's size if None.

        Returns:
            (B,C,Qh,Qw), of the features' dtype.
        """

    @classmethod
    def own_names(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of the authors' file -> that of this class; here the same names."""
        return state

    @classmethod
    def read_weights(cls, path: Path) -> dict[str, Tensor]:
        """The state dict of a file, the authors' or one of `save`, with this class's names.

        Raises:
            WeightsError: damaged or unsafe. FileNotFoundError: no such file.
        """
        return cls.own_names(read_weights(path.expanduser(), cls.nests)[0])

    @classmethod
    def channels_of(cls, weights: Path | None, name: str, channels: int | None, axis: int = 1, others: int = 0) -> int:
        """C of a peer made for one encoder: the size of its weight `name` along `axis`, without `others`, channels that
        are no features; `channels` if it has no file.

        Raises:
            ValueError: neither is given, or both and they differ. WeightsError, FileNotFoundError: as `read_weights`.
        """
        if weights is None:
            if channels is None or channels < 1:
                raise ValueError("it is made for one encoder: give weights=FILE, or for new weights channels=C")
            return channels
        state = cls.read_weights(weights)
        if name not in state:
            raise WeightsError(f"weights {weights} are not those of {cls.__name__}: they have no {name}")
        found = state[name].shape[axis] - others
        if channels not in (None, found):
            raise ValueError(f"its weights take features of {found} channels: leave out channels={channels}")
        return found

    def load_weights(self, path: Path) -> None:
        """Loads the weights of a file, .safetensors, or .pth/.pt/.ckpt/.bin without code; names and shapes must be this
        module's, after `own_names`.

        Raises:
            WeightsError: damaged, unsafe, or with other names or shapes. FileNotFoundError: no such file.
        """
        try:
            self.load_state_dict(self.read_weights(path))
        except RuntimeError as error:  # PyTorch's list of names and shapes, one a line
            reasons = " ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise WeightsError(f"weights {path} are not those of {type(self).__name__}: {reasons}") from error

    def save(self, path: Path) -> None:
        """Writes weights and settings (.safetensors), atomically; `{peer: NAME, weights: PATH}` is this peer again.

        Raises:
            ValueError: it was not made from a configuration. CannotWrite: the file cannot be written.
        """
        if self.settings is None:
            raise ValueError(f"{type(self).__name__} has no settings to write: make it with peer_from_config")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with replacing(path) as part:
            save_file(state, part, recorded_as(self.choice, self.settings))


def resampled(output: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,C,Qh,Qw) -> (B,C,*size): means over cells along an axis that shrinks, bilinear along one that grows."""
    smaller = tuple(map(min, output.shape[-2:], size))
    return F.interpolate(F.interpolate(output, smaller, mode="area"), size, mode="bilinear")


_choices = Choices("peer", Peer, __package__, SettingError)
register_peer = _choices.register
"""`@register_peer("name")` offers a class as the peer `name`: `core.registry.Choices.register`."""
peers = _choices.all
"""All registered peers by name."""


def make_peer(name: str) -> Peer:
    """The peer `name` with its default settings, in eval mode; raises as `peer_from_config`."""
    return peer_from_config(name)


def peer_from_config(node: PeerNode, seed: int = 0) -> Peer:
    """The peer of a configuration node, NAME or `{peer: NAME, SETTING: VALUE, ...}`, in eval mode on the CPU.

    `seed` is that of its initial weights, where it has no file.

    Raises:
        SettingError: as `peer_settings`; weights that cannot be used, or a value that the peer refuses.
    """
    settings = peer_settings(node)
    name = settings["name"]
    try:
        with named_stream(seed, f"peer/{name}"):
            peer = _choices.make(settings).eval()
    except (ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingError(f"peer={name}: {reason}") from error
    peer.settings = {key: value for key, value in settings.items() if key != "name"}
    return peer


def peer_settings(node: PeerNode) -> dict[str, Any]:
    """The checked settings of a node: {"name": NAME} and all settings of that peer.

    One that is left out is as in the training that wrote the `weights`, if that was one of `experiments.train`; else
    the default.

    Raises:
        SettingError: unknown name, an unknown, missing or wrong setting, a file that does not exist, or weights of
            another peer; names it.
    """
    if isinstance(node, str):
        return _choices.settings({"name": node})
    try:
        values = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    except OmegaConfBaseException as error:
        raise SettingError(f"{str(error).splitlines()[0]}; give it a value") from error
    if not isinstance(values, Mapping) or "peer" not in values or "name" in values:
        raise SettingError(f"a peer must be NAME, or {{peer: NAME, SETTING: VALUE, ...}}, got {values}")
    values = dict(values)
    name = values.pop("peer")
    settings = _choices.settings({"name": name, **_of_training(name, values.get("weights")), **values})
    for key, value in settings.items():
        if isinstance(value, Path) and not value.expanduser().is_file():
            raise SettingError(f"peer={settings['name']}: its {key} {value} does not exist; give a file's path")
    return settings


def peer_identity(node: PeerNode) -> dict[str, Any]:
    """JSON values that are equal for two nodes only if they give the same peer. Files count by their content.

    Raises:
        SettingError: as `peer_settings`; a checkpoint that cannot be found.
    """
    settings = peer_settings(node)
    try:
        named = {key: checkpoint.find(settings[key]) for key in peers()[settings["name"]].checkpoints}
    except (WeightsError, OSError) as error:
        raise SettingError(f"peer={settings['name']}: {error}") from error
    return {key: _identity(value) for key, value in (settings | named).items()}


def named_peers(setting: DictConfig | ListConfig | None) -> dict[str, PeerNode]:
    """The peers that a setting asks for: name of the arm -> node.

    Args:
        setting: `[NAME, ...]`, or `{ARM: NAME, ARM: {peer: NAME, SETTING: VALUE, ...}, ...}`; None: all that need
            neither weights nor settings, and do not optimise for each image.

    Raises:
        SettingError: another form, one name twice, or an arm with the name of another peer.
    """
    if setting is None:
        return {name: name for name, cls in peers().items() if _is_complete(cls)}
    if isinstance(setting, DictConfig):
        for arm in setting:
            if arm in peers() and peer_settings(setting[arm])["name"] != arm:
                raise SettingError(f"peers.{arm} is not the peer of that name: give the arm another name")
        return {str(arm): setting[arm] for arm in setting}
    names = list(setting) if isinstance(setting, ListConfig) else [setting]
    if not isinstance(setting, ListConfig) or not all(isinstance(name, str) for name in names):
        raise SettingError(
            f"peers must be null, [NAME, ...], or with settings {{ARM: {{peer: NAME, KEY: VALUE}}, ...}}, got {setting}"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingError(f"two arms are called {', '.join(twice)}: peers names one twice")
    return {name: name for name in names}


def _of_training(name: str, weights: object) -> dict[str, Any]:
    """The settings with which `experiments.train` trained the peer in a file; empty for any other file."""
    found = settings_of(Path(str(weights)).expanduser()) if weights else None
    if found is None:
        return {}
    if found["name"] != name:
        raise SettingError(f"peer={name}: its weights {weights} are a trained {found['name']}: choose that peer")
    return {key: value for key, value in found.items() if key != "name"}


def _is_complete(cls: type[Peer]) -> bool:
    fields = signature_fields(cls)
    return "weights" not in fields and not cls.optimises and all(default != MISSING for _, default in fields.values())


def _identity(value: Any) -> Any:
    if isinstance(value, Path):
        return content_digest(value.expanduser())
    return value.name if isinstance(value, Enum) else value
