"""The hook points that the baseline leaves empty: `decoder=none`, `refiner=none`, `temporal=none`."""

from torch import Tensor

from core.batch import Context
from core.hooks import Decoder, Refiner, Temporal
from core.registry import register


@register("none")
class NoDecoder(Decoder):
    """Keeps the explicit output."""

    linear_in_values = True

    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output: Tensor, context: Context) -> Tensor:
        return output


@register("none")
class NoRefiner(Refiner):
    """Keeps the decoded output."""

    needs_whole_output = False
    linear_in_values = True

    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output: Tensor, context: Context) -> Tensor:
        return output


@register("none")
class NoTemporal(Temporal):
    """Treats every frame as if it were alone."""

    needs_whole_output = False
    linear_in_values = True

    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output: Tensor, context: Context, state: object | None) -> tuple[Tensor, object | None]:
        return output, state
