"""The choices of one variant: checkpoint, filler of each hook point, and the fillers' settings."""

from collections.abc import Sequence

import panel as pn

from core.hooks import MODEL_HOOKS
from experiments.page import models
from experiments.page.elements import small
from experiments.page.models import Setting, Variant

WIDTH = 290


class VariantControls:
    """Widgets for one variant. What is offered is read from the registry when the page is opened.

    Args:
        checkpoints: sources of weights; the first is chosen.
        hooks: hook points that are offered. chosen: hook point -> filler that is chosen at first.
    """

    def __init__(self, checkpoints: Sequence[str], hooks: Sequence[str], chosen: dict[str, str] | None = None):
        self.checkpoint = pn.widgets.Select(label="weights", options=list(checkpoints), width=WIDTH)
        self.fillers = {
            hook: pn.widgets.Select(label=hook, options=models.offered(hook), width=WIDTH) for hook in hooks
        }
        self.settings: dict[str, dict[str, pn.widgets.Widget]] = {hook: {} for hook in hooks}
        self._boxes = {hook: pn.Column(width=WIDTH) for hook in hooks}
        self._purposes = {hook: pn.pane.HTML(width=WIDTH, margin=(0, 10, 5, 10)) for hook in hooks}
        for hook in hooks:
            self.fillers[hook].param.watch(lambda _, hook=hook: self._offer_settings(hook), "value")
        self.checkpoint.param.watch(lambda _: self._defaults(), "value")
        self._defaults()
        for hook, name in (chosen or {}).items():
            self.fillers[hook].value = name

    @property
    def variant(self) -> Variant:
        """What is chosen."""
        fillers = []
        for hook in MODEL_HOOKS:
            if hook in self.fillers:
                values = [(key, widget.value) for key, widget in self.settings[hook].items()]
                fillers.append((hook, self.fillers[hook].value, tuple(one for one in values if one[1] is not None)))
        return Variant(self.checkpoint.value, tuple(fillers))

    @property
    def panel(self) -> pn.Column:
        """All widgets, one below the other."""
        rows = [self.checkpoint] if len(self.checkpoint.options) > 1 else []
        for hook, select in self.fillers.items():
            rows += [select, self._purposes[hook], self._boxes[hook]]
        return pn.Column(*rows, width=WIDTH)

    def _defaults(self) -> None:
        """Chooses what the checkpoint has."""
        config = models.described(self.checkpoint.value)
        for hook, select in self.fillers.items():
            select.value = config[hook]["name"]
            self._offer_settings(hook)  # the same filler may have other settings there

    def _offer_settings(self, hook: str) -> None:
        name = self.fillers[hook].value
        known = models.described(self.checkpoint.value)[hook]
        of_checkpoint = known if known["name"] == name else {}
        self.settings[hook] = {
            key: _widget(key, kind, of_checkpoint.get(key, default))
            for key, (kind, default) in models.settings_of(hook, name).items()
        }
        self._purposes[hook].object = small(models.purpose(hook, name))
        self._boxes[hook].objects = list(self.settings[hook].values())


def _widget(key: str, kind: type, value: Setting) -> pn.widgets.Widget:
    if kind is bool:
        return pn.widgets.Checkbox(label=key, value=value, width=WIDTH)
    if kind is float:
        return pn.widgets.FloatInput(label=key, value=value, end=models.bound(value), step=0.05, width=WIDTH - 20)
    if kind is int:
        return pn.widgets.IntInput(label=key, value=value, end=int(models.bound(value)), width=WIDTH - 20)
    return pn.widgets.Select(label=key, options=list(kind.__members__), value=value, width=WIDTH - 20)
