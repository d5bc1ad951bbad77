"""The class of peers, and how one is registered, configured and made."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from core.registry import Choices, signature_fields
from core.streams import named_stream
from core.weight_files import WeightsError, content_digest, read_weights
from experiments.errors import Told
from experiments.settings import SettingError

PeerNode = str | Mapping[str, Any] | DictConfig
"""A peer in a configuration: NAME, or `{peer: NAME, SETTING: VALUE, ...}`."""


class CannotUpsample(Told, ValueError):
    """An input that a peer does not support: its channels, the factor, a grid below its window; says which."""


class Peer(nn.Module, ABC):
    """Another method to upsample features, called like AnyUp.

    The settings are the arguments of `__init__`, each with a type. A file is a `Path`. A method with trained weights
    has the argument `weights: Path` (`Path | None = None` if it works without), and reads it with `load_weights`.
    `__init__` may raise ValueError or OSError for values that it cannot use. Its initial weights are the same every
    time.

    What a peer may rely on: forward is called in eval mode under `torch.no_grad()`, never under
    `torch.inference_mode()`, so a method that optimises for each image may use `torch.enable_grad()`.

    What a peer must keep: equal inputs give equal outputs, and an image does not depend on the others of its batch. It
    refuses inputs that it does not support, by `channels`, by `factor`, or by raising `CannotUpsample` in forward
    before anything is computed.

    `experiments.train` trains only AnyUp. To train a peer there, it would need random weights without `weights`,
    gradients for all its parameters in train mode at any output size, and a `generator` argument of forward as AnyUp
    has. The training's model, checkpoint and resuming would have to name a peer (`make_model`, `core.save`).
    """

    choice: ClassVar[str]
    """The name it is registered under."""
    channels: int | None = None
    """The number of channels C, for a peer made for one encoder; None: any."""
    linear_in_values: ClassVar[bool] = False
    """Whether each output is a weighted sum of features, with weights that sum to 1 and do not depend on the features.
    A linear head may then be applied before upsampling, to fewer values."""
    factor: int | None = None
    """How many times it enlarges the feature grid, if it has one fixed factor; None: any output size."""

    def __call__(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Upsamples, or refuses inputs that it does not support.

        Raises:
            CannotUpsample: it does not support these features or this output size.
        """
        if self.channels is not None and features.shape[1] != self.channels:
            raise CannotUpsample(
                f"peer {self.choice} takes features of {self.channels} channels, got {features.shape[1]}: choose the "
                "backbone that it was made for"
            )
        rows, columns = image.shape[-2:] if output_size is None else output_size
        h, w = features.shape[-2:]
        if self.factor is not None and (rows, columns) != (self.factor * h, self.factor * w):
            raise CannotUpsample(
                f"peer {self.choice} enlarges {self.factor} times, {h}x{w} features to {self.factor * h}x"
                f"{self.factor * w}, not to {rows}x{columns}: choose that output size"
            )
        return super().__call__(image, features, output_size)

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

    def load_weights(self, path: Path) -> None:
        """Loads the weights of a file, .safetensors or .pth/.pt/.bin without code; names and shapes must be this
        module's.

        Raises:
            WeightsError: damaged, unsafe, or with other names or shapes. FileNotFoundError: no such file.
        """
        state, _ = read_weights(path.expanduser())
        try:
            self.load_state_dict(state)
        except RuntimeError as error:  # PyTorch's list of names and shapes, one a line
            reasons = " ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise WeightsError(f"weights {path} are not those of {type(self).__name__}: {reasons}") from error


_choices = Choices("peer", Peer, "experiments.peers", SettingError)
register_peer = _choices.register
"""`@register_peer("name")` offers a class as the peer `name`: `core.registry.Choices.register`."""
peers = _choices.all
"""All registered peers by name."""


def make_peer(name: str) -> Peer:
    """The peer `name` with its default settings, in eval mode; raises as `peer_from_config`."""
    return peer_from_config(name)


def peer_from_config(node: PeerNode) -> Peer:
    """The peer of a configuration node, NAME or `{peer: NAME, SETTING: VALUE, ...}`, in eval mode on the CPU.

    Raises:
        SettingError: as `peer_settings`; weights that cannot be used, or a value that the peer refuses.
    """
    settings = peer_settings(node)
    name = settings["name"]
    try:
        with named_stream(0, f"peer/{name}"):  # for the initial weights, even if they are overwritten
            return _choices.make(settings).eval()
    except (ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingError(f"peer={name}: {reason}") from error


def peer_settings(node: PeerNode) -> dict[str, Any]:
    """The checked settings of a node: {"name": NAME} and all settings of that peer, with defaults where left out.

    Raises:
        SettingError: unknown name, an unknown, missing or wrong setting, or a file that does not exist; names it.
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
    settings = _choices.settings({"name": values.pop("peer"), **values})
    for key, value in settings.items():
        if isinstance(value, Path) and not value.expanduser().is_file():
            raise SettingError(f"peer={settings['name']}: its {key} {value} does not exist; give a file's path")
    return settings


def peer_identity(node: PeerNode) -> dict[str, Any]:
    """JSON values that are equal for two nodes only if they give the same peer. Files count by their content.

    Raises:
        SettingError: as `peer_settings`.
    """
    return {key: _identity(value) for key, value in peer_settings(node).items()}


def named_peers(setting: DictConfig | ListConfig | None) -> dict[str, PeerNode]:
    """The peers that a setting asks for: name of the arm -> node.

    Args:
        setting: `[NAME, ...]`, or `{ARM: NAME, ARM: {peer: NAME, SETTING: VALUE, ...}, ...}`; None: all that need
            neither weights nor settings.

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


def _is_complete(cls: type[Peer]) -> bool:
    fields = signature_fields(cls)
    return "weights" not in fields and all(default != MISSING for _, default in fields.values())


def _identity(value: Any) -> Any:
    if isinstance(value, Path):
        return content_digest(value.expanduser())
    return value.name if isinstance(value, Enum) else value
