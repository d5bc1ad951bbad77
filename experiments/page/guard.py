"""What is expected to go wrong becomes a message on the page; a defect becomes one too, and keeps its traceback."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import panel as pn

from core.weight_files import WeightsError
from experiments.errors import Told
from experiments.page.elements import Message

log = logging.getLogger(__name__)

EXPECTED = (Told, WeightsError, OSError, ValueError, ModuleNotFoundError)
"""What files, settings and fillers refuse with a message that says the way out."""


@contextmanager
def reported(message: Message, button: pn.widgets.Button | None = None) -> Iterator[None]:
    """Shows what is refused inside; meanwhile `button` cannot be pressed."""
    if button is not None:
        button.param.update(loading=True, disabled=True)
    try:
        yield
    except EXPECTED as error:
        message.say(str(error).splitlines()[0] if str(error) else type(error).__name__, "error")
    finally:
        if button is not None:
            button.param.update(loading=False, disabled=False)


def told(message: Message) -> None:
    """Makes the page's message say of defects that there was one; the traceback goes to the log."""

    def handle(error: BaseException) -> None:
        log.error("a defect of the demo page", exc_info=error)
        message.say("Something went wrong that should not: the terminal shows the traceback.", "error")

    pn.config.exception_handler = handle
