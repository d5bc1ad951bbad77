"""Fillers of the hook points that the baseline does not use: `decoder=none`, `refiner=none`, `temporal=none`."""

from torch import Tensor

from core.batch import Context
from core.hooks import Decoder, Refiner, Temporal
from core.registry import register


@register("none")
class NoDecoder(Decoder):
    """Returns attention's output unchanged."""

    linear_in_values = True

    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output: Tensor, context: Context) -> Tensor:
        return output


@register("none")
class NoRefiner(Refiner):
    """Returns the decoder's output unchanged."""

    needs_whole_output = False
    linear_in_values = True

    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output: Tensor, context: Context) -> Tensor:
        return output


@register("none")
class NoTemporal(Temporal):
    """Treats every frame on its own: returns output and state unchanged."""

    needs_whole_output = False
    linear_in_values = True

    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output: Tensor, context: Context, state: object | None) -> tuple[Tensor, object | None]:
        return output, state
