"""Errors that a command reports in one line. Any other error is a defect and keeps its traceback."""


class Told(Exception):
    """Base of errors about a setting, a file, data or a service. The message says what is wrong and the way out."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C with a message: how far the work got, and how to go on."""
