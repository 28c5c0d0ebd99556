"""Exceptions that end a command early. Any other exception is a bug and shows a traceback."""


class UserError(Exception):
    """Bad input. The message is one line: where, what is wrong, what to do. Exit code 2."""


class Failure(Exception):
    """The run cannot continue, and no input is at fault (disk full, NaN). One line, exit code 1."""


class Stopped(Exception):
    """Training stopped on request after a checkpoint. Exit code 75: resume later."""

    def __init__(self, message: str, code: int = 75):
        super().__init__(message)
        self.code = code
