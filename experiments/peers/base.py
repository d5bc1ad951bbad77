"""What a peer is, and how one is registered and made."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

from torch import Tensor, nn

_peers: dict[str, type["Peer"]] = {}
_T = TypeVar("_T", bound=type["Peer"])


class Peer(nn.Module, ABC):
    """An upsampler for the features of any encoder, to compare with."""

    choice: ClassVar[str]
    """The name it is registered under."""

    @abstractmethod
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Upsamples as `core.AnyUp.forward` does.

        Args:
            image: (B,3,H,W), normalised with ImageNet's mean and deviation.
            features: (B,C,h,w), any C, of the same images; they tile the image, whatever h and w are.
            output_size: (Qh,Qw); the image's size if None.

        Returns:
            (B,C,Qh,Qw).
        """


def register_peer(name: str) -> Callable[[_T], _T]:
    """Offers a class as the peer `name`; running the same definition again replaces the earlier one.

    Raises:
        ValueError: another peer has that name.
    """

    def add(cls: _T) -> _T:
        known = _peers.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a peer {name} is already registered by {known.__module__}.{known.__qualname__}")
        cls.choice = name
        _peers[name] = cls
        return cls

    return add


def peers() -> dict[str, type[Peer]]:
    """All registered peers by name."""
    return dict(_peers)


def make_peer(name: str) -> Peer:
    """The peer `name` with its default settings, in eval mode.

    Raises:
        ValueError: unknown name; lists what there is.
    """
    if name not in _peers:
        raise ValueError(f"no peer is called {name!r}; there are: {', '.join(sorted(_peers))}")
    return _peers[name]().eval()
