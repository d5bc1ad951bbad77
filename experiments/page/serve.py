"""Offers the page on an address of this machine, until Ctrl-C."""

import logging
import tempfile
from pathlib import Path
from threading import Lock

import panel as pn
from omegaconf import DictConfig, OmegaConf

from core import checkpoint
from experiments.page import models
from experiments.page.guard import told
from experiments.page.image_tab import ImageTab
from experiments.page.uploads import MAX_BYTES, Uploads
from experiments.page.video_tab import VideoTab
from experiments.settings import SettingError, check_count

log = logging.getLogger(__name__)

TITLE = "AnyUp Lab"
_HELP = Path(__file__).with_name("help.md")
_MESSAGE_BYTES = MAX_BYTES * 3 // 2
"""Largest message that the server takes: a file is a third longer on its way."""


def serve(config: DictConfig) -> None:
    """Serves the page; settings: configs/demo.yaml. Returns after Ctrl-C.

    Raises:
        SettingError, OSError, WeightsError: found before the page is offered.
    """
    encoders, checkpoints = checked(config)
    encoders.get(encoders.names[0])  # the first visitor need not wait for it
    lock = Lock()
    pn.extension(nthreads=2, notifications=False, design="native")
    with tempfile.TemporaryDirectory(prefix="anyup-demo-") as folder:
        server = pn.serve(
            {"/": lambda: page(encoders, checkpoints, Path(folder), lock)},
            port=config.port,
            address=config.address,
            websocket_origin=[f"{host}:{config.port}" for host in (config.address, "localhost")] + list(config.origins),
            websocket_max_message_size=_MESSAGE_BYTES,
            title=TITLE,
            show=config.show,
            verbose=False,
            start=False,
        )
        log.info("Open http://%s:%s in a browser. Ctrl-C ends.", config.address, config.port)
        server.run_until_shutdown()


def checked(config: DictConfig) -> tuple[models.Encoders, list[str]]:
    """The encoders and checkpoints that the settings offer. Raises as `serve`."""
    check_count("port", config.port)
    nodes = OmegaConf.to_container(config.backbones, resolve=True) if config.backbones is not None else None
    encoders, checkpoints = models.Encoders(nodes), [str(source) for source in config.checkpoints]
    if not checkpoints:
        raise SettingError("checkpoints is empty: give at least one, such as checkpoints=[bundled]")
    for source in checkpoints:
        checkpoint.find(source)
    return encoders, checkpoints


def page(encoders: models.Encoders, checkpoints: list[str], folder: Path, lock: Lock) -> pn.viewable.Viewable:
    """The page of one visitor; what was uploaded, into a folder inside `folder`, is removed when it is closed."""
    uploads = Uploads(folder)
    image, video = (kind(encoders, checkpoints, uploads, lock) for kind in (ImageTab, VideoTab))
    pn.state.on_session_destroyed(lambda context: uploads.close())
    told(image.message)
    pn.state.onload(image.start)
    tabs = [
        (name, pn.Row(tab.settings, tab.panel, sizing_mode="stretch_width"))
        for name, tab in (("Image", image), ("Video", video))
    ]
    help_ = pn.pane.Markdown(_HELP.read_text(encoding="utf-8"), max_width=760)
    return pn.Column(
        pn.pane.Markdown(f"# {TITLE}: features of any encoder, at any resolution"),
        pn.Tabs(*tabs, ("Help", help_), sizing_mode="stretch_width"),
        sizing_mode="stretch_width",
        styles={"font-family": "system-ui, sans-serif", "max-width": "1400px"},
    )
