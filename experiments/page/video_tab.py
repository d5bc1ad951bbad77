"""The tab for a short video: each frame alone, and with a temporal filler."""

import base64
from threading import Lock

import panel as pn

from experiments.data.image_files import BUNDLED
from experiments.data.video_files import Frame, write_video
from experiments.page import clips, models
from experiments.page.controls import WIDTH, VariantControls
from experiments.page.elements import Gallery, Message, Upload
from experiments.page.guard import reported
from experiments.page.uploads import Uploads, pan
from experiments.reports.pictures import panel as side_by_side

FIRST = {"temporal": "temporal_consistency"}
RATE = 8.0
"""Frames per second of the film that is shown."""


class VideoTab:
    """Widgets and results of one visitor's video.

    Args:
        encoders, checkpoints: what is offered. uploads: where files go. lock: held while anything is computed.
    """

    def __init__(self, encoders: models.Encoders, checkpoints: list[str], uploads: Uploads, lock: Lock):
        self.encoders, self.uploads, self.lock = encoders, uploads, lock
        self.message = Message(sizing_mode="stretch_width")
        self.picture = pn.widgets.Select(label="camera moves over", options=[*BUNDLED], value="coffee", width=WIDTH)
        self.upload = Upload(
            self._upload, self._refuse, accept="video/*", label="or your own short video", width=WIDTH, margin=(5, 10)
        )
        self.encoder = pn.widgets.Select(label="encoder", options=encoders.names, width=WIDTH)
        self.controls = VariantControls(checkpoints, ["attention", "temporal"], FIRST)
        self.run = pn.widgets.Button(label="Upsample the video", color="primary", width=WIDTH)
        self.progress = pn.indicators.Progress(value=0, max=1, width=WIDTH, bar_color="primary", visible=False)
        self.film = pn.pane.HTML(sizing_mode="stretch_width")
        self.frame = pn.widgets.IntSlider(label="frame", start=0, end=1, value=0, width=WIDTH, disabled=True)
        self.gallery = Gallery(sizing_mode="stretch_width", margin=(5, 10))
        self.pictures: list[dict] = []
        self._own: tuple[str, list[Frame], str] | None = None
        self.run.on_click(self.upsample)
        self.picture.param.watch(self._forget, "value")
        self.frame.param.watch(self._show_frame, "value")

    def upsample(self, *_: object) -> None:
        """Computes the film and shows it."""
        with self.lock, reported(self.message, self.run):
            name, frames, remark = self._own or (
                f"a camera over {self.picture.value}",
                pan(self.picture.value, clips.MAX_FRAMES, clips.SIDE),
                "",
            )
            self.message.say(f"Upsampling {len(frames)} frames of {name} …")
            self.progress.param.update(max=len(frames), value=0, visible=True)
            model, new = models.build(self.controls.variant)
            try:
                self.pictures, changes = clips.clip_pictures(
                    frames, self.encoders.get(self.encoder.value), model, self._count
                )
            finally:
                self.progress.visible = False
            self._show_film()
            alone, together = (f"{changes[kind]:.3f} {kind}" for kind in (clips.ALONE, clips.TOGETHER))
            done = f"{len(frames)} frames of {name}. Change from frame to frame: {alone}, {together}."
            remarks = [text for text in (models.untrained(new), remark) if text]
            self.message.say(" ".join([done, *remarks]), "warning" if remarks else "info")

    @property
    def settings(self) -> pn.Column:
        """The choices, for the left side of the tab."""
        return pn.Column(
            self.picture,
            self.upload,
            self.encoder,
            self.controls.panel,
            self.run,
            self.progress,
            width=WIDTH + 30,
        )

    @property
    def panel(self) -> pn.Column:
        """The film and its single frames."""
        return pn.Column(
            self.message,
            self.film,
            pn.pane.Markdown("### Single frames"),
            self.frame,
            self.gallery,
            sizing_mode="stretch_width",
        )

    def _count(self, count: int) -> None:
        self.progress.value = count

    def _forget(self, *_: object) -> None:
        self._own = None

    def _upload(self, name: str, data: bytes) -> None:
        with self.lock, reported(self.message):
            frames, remark = self.uploads.video(name, data, clips.MAX_FRAMES, clips.SIDE)
            self._own = (name, frames, remark)
            self.message.say(f"{name}: {len(frames)} frames. Press the button to upsample them. {remark}")

    def _refuse(self, reason: str) -> None:
        self.message.say(reason, "error")

    def _show_film(self) -> None:
        path = self.uploads.folder / "film.mp4"
        write_video(path, (side_by_side(one) for one in self.pictures), RATE)
        source = base64.b64encode(path.read_bytes()).decode()
        self.film.object = (
            '<video controls loop autoplay muted playsinline style="max-width:100%" '
            f'src="data:video/mp4;base64,{source}"></video>'
        )
        self.frame.param.update(end=len(self.pictures) - 1, value=0, disabled=len(self.pictures) < 2)
        self._show_frame()

    def _show_frame(self, *_: object) -> None:
        if self.frame.value < len(self.pictures):
            self.gallery.show(self.pictures[self.frame.value], f"frame {self.frame.value}")
