"""What a command tells in one line; anything else is a defect and keeps its traceback."""


class Told(Exception):
    """Base of errors of a setting, a file, data or a service: the message says what it is and the way out."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C where something is to be said: how far the work is, and how it goes on."""
