"""The ways in which a verb ends early; anything else is a bug and shows its traceback."""


class UserError(Exception):
    """Bad input. Its text is one line that says what, where and what to do; the process exits
    with 2.
    """


class Failure(Exception):
    """The run cannot go on, through nobody's bad input; one line, and the process exits with 1."""


class Stopped(Exception):
    """Training stopped on request after saving; the process exits with `code` (75: resume me)."""

    def __init__(self, message: str, code: int = 75):
        super().__init__(message)
        self.code = code
