"""The tab for one image: two variants beside each other, similarity to a pixel, attention, uncertainty."""

import time
from collections.abc import Callable
from threading import Lock

import numpy as np
import panel as pn
from torch import Tensor

from core.hooks import MODEL_HOOKS
from experiments.data.image_files import BUNDLED
from experiments.page import engine, models
from experiments.page.controls import WIDTH, VariantControls
from experiments.page.elements import Gallery, Message, Swipe, Upload, described
from experiments.page.guard import reported
from experiments.page.uploads import Uploads, example

IMAGE_SIDES = (112, 160, 224, 320, 448)
FIRST_SIDE = 224
"""Longer side in pixels of the image that encoder and model see: on a processor, an answer within seconds."""
FIRST_OTHER = {"attention": "global"}
"""How variant B differs at first."""


_COLOURS = """
Features have hundreds of channels. Red, green and blue show their three strongest directions.

Equal colours mean equal features, on both sides of the slider. Colours have no other meaning. For maps that can be read
without colours, see below.
"""


class ImageTab:
    """Widgets and results of one visitor's image.

    Args:
        encoders, checkpoints: what is offered. uploads: where files go. lock: held while anything is computed.
    """

    def __init__(self, encoders: models.Encoders, checkpoints: list[str], uploads: Uploads, lock: Lock):
        self.encoders, self.uploads, self.lock = encoders, uploads, lock
        self.message = Message(sizing_mode="stretch_width")
        self.picture = pn.widgets.Select(label="photograph", options=[*BUNDLED], width=WIDTH)
        self.upload = Upload(
            self._upload, self._refuse, accept="image/*", label="or your own image", width=WIDTH, margin=(5, 10)
        )
        self.encoder = pn.widgets.Select(label="encoder", options=encoders.names, width=WIDTH)
        self.side = pn.widgets.Select(
            label="image, longer side in pixels", options=list(IMAGE_SIDES), value=FIRST_SIDE, width=WIDTH
        )
        self.output_side = pn.widgets.IntInput(
            label="output, longer side (empty: the image's)", value=None, start=1, step=32, width=WIDTH - 20
        )
        hooks = [hook for hook in MODEL_HOOKS if hook != "temporal"]
        self.variants = {
            "A": VariantControls(checkpoints, hooks),
            "B": VariantControls(checkpoints, hooks, FIRST_OTHER),
        }
        self.run = pn.widgets.Button(label="Upsample", color="primary", width=WIDTH)
        self.swipe = Swipe(width=480, margin=(5, 10))
        self.sides = [pn.widgets.Select(label=name, options=[], width=200) for name in ("left", "right")]
        self.similarity = Gallery(clickable=True, sizing_mode="stretch_width", margin=(5, 10))
        self.attention = Gallery(clickable=True, sizing_mode="stretch_width", margin=(5, 10))
        self.uncertainty = Gallery(sizing_mode="stretch_width", margin=(5, 10))
        self.measure = pn.widgets.Select(label="measure", options=list(engine.MEASURES), width=200)
        self.opacity = pn.widgets.FloatSlider(label="strength of the overlays", start=0, end=1, value=0.7, width=200)
        self.image: Tensor | None = None
        self.name = ""
        self.outputs: dict[str, engine.Upsampled] = {}
        self.shown: engine.Pictures = {}
        self._point: engine.Point = (0.5, 0.5)
        self._weights: dict[str, np.ndarray] = {}
        self._connect()

    def start(self) -> None:
        """The first answer, for the first photograph."""
        self._choose_example()

    def upsample(self, *_: object) -> None:
        """Computes both variants and shows everything."""
        with self.lock, reported(self.message, self.run):
            began = time.monotonic()
            self.message.say(f"Upsampling {self.name} …")
            of = engine.encoded(self.image, self.encoders.get(self.encoder.value), self.side.value, self.name)
            engine.checked_size(of, self.output_side.value)
            outputs, remarks = {}, []
            for name, controls in self.variants.items():
                model, new = models.build(controls.variant)
                title = f"{name}: {models.label(controls.variant)}"
                outputs[title] = engine.upsampled(of, model, self.output_side.value)
                remarks += [f"{name}: {text}" for text in (models.untrained(new), outputs[title].remark) if text]
            self.outputs, self.shown = outputs, engine.feature_pictures(of, outputs)
            self._show_sides()
            self._look()
            self._show_uncertainty()
            grid, size = of.features.shape[-2:], outputs[title].output.shape[-2:]
            took = f"in {time.monotonic() - began:.1f} s"
            done = f"{self.name}: {grid[0]} x {grid[1]} cells to {size[0]} x {size[1]} pixels {took}."
            self.message.say(" ".join([done, *remarks]), "warning" if remarks else "info")

    def look(self, point: list[float]) -> None:
        """Shows similarity and attention for a point, (row, column) in the unit square."""
        with self.lock, reported(self.message):
            self._point = (float(point[0]), float(point[1]))
            self._look()

    @property
    def settings(self) -> pn.Column:
        """The choices, for the left side of the page."""
        cards = [
            pn.Card(controls.panel, title=f"Variant {name}", collapsed=name == "A", width=WIDTH + 20)
            for name, controls in self.variants.items()
        ]
        return pn.Column(
            self.picture, self.upload, self.encoder, self.side, self.output_side, self.run, *cards, width=WIDTH + 30
        )

    @property
    def panel(self) -> pn.Column:
        """The pictures."""
        return pn.Column(
            self.message,
            pn.pane.Markdown("### Compare: move the slider"),
            pn.Row(*self.sides),
            pn.Row(self.swipe, pn.pane.Markdown(_COLOURS, width=300)),
            pn.pane.Markdown("### Similarity: click a pixel of any picture"),
            self.similarity,
            pn.pane.Markdown("### Attention: the cells that this pixel is made of, and its window"),
            self.opacity,
            self.attention,
            pn.pane.Markdown("### Uncertainty"),
            self.measure,
            self.uncertainty,
            sizing_mode="stretch_width",
        )

    def _connect(self) -> None:
        self.run.on_click(self.upsample)
        self.picture.param.watch(self._choose_example, "value")
        for select in self.sides:
            select.param.watch(self._show_swipe, "value")
        for gallery in (self.similarity, self.attention):
            gallery.param.watch(lambda event: self._clicked(event.new), "point")
        self.measure.param.watch(self._again(self._show_uncertainty), "value")
        self.opacity.param.watch(self._again(self._show_attention, self._show_uncertainty), "value_throttled")

    def _again(self, *show: Callable[[], None]) -> Callable[..., None]:
        def shown(*_: object) -> None:
            with self.lock, reported(self.message):
                for one in show if self.outputs else ():
                    one()

        return shown

    def _choose_example(self, *_: object) -> None:
        self.image, self.name = example(self.picture.value), self.picture.value
        self.upsample()

    def _upload(self, name: str, data: bytes) -> None:
        with self.lock, reported(self.message):
            self.image, self.name = self.uploads.image(name, data), name
        if self.name == name:
            self.upsample()

    def _refuse(self, reason: str) -> None:
        self.message.say(reason, "error")

    def _clicked(self, point: list[float]) -> None:
        if self.outputs and point and tuple(point) != self._point:
            self.look(point)

    def _look(self) -> None:
        of = next(iter(self.outputs.values())).encoded
        pictures, limits = engine.similarity_pictures(of, self.outputs, self._point)
        self.similarity.show({"image": self.shown["image"]} | pictures, "similarity to the chosen pixel", _ends(limits))
        self.similarity.point = list(self._point)
        self._weights = engine.attention_maps(self.outputs, self._point)
        self._show_attention()

    def _show_attention(self) -> None:
        of = next(iter(self.outputs.values())).encoded
        pictures = engine.attention_pictures(of, self._weights, self.opacity.value)
        self.attention.show(pictures, "attention of the chosen pixel", ("0", "largest weight"))
        self.attention.point = list(self._point)

    def _show_uncertainty(self) -> None:
        pictures, limits = engine.uncertainty_pictures(self.outputs, self.measure.value, self.opacity.value)
        self.uncertainty.show(pictures, f"uncertainty, {self.measure.value}", _ends(limits))

    def _show_sides(self) -> None:
        titles = list(self.shown)
        for select, first in zip(self.sides, (2, 3), strict=True):  # bilinear, A
            before = select.options.index(select.value) if select.value in select.options else first
            select.param.update(options=titles, value=titles[before])
        self._show_swipe()

    def _show_swipe(self, *_: object) -> None:
        chosen = [select.value for select in self.sides]
        if all(name in self.shown for name in chosen):
            self.swipe.pictures = [described({name: self.shown[name]}, "features")[0] for name in chosen]


def _ends(limits: tuple[float, float] | None) -> tuple[str, str] | None:
    return None if limits is None else (f"{limits[0]:.2f}", f"{limits[1]:.2f}")
