"""The two kinds of failure: what a user can mend, and everything else."""


class UserError(Exception):
    """Bad input. Its text is one line that says what, where and what to do; the process exits
    with 2.
    """


class Stopped(Exception):
    """Training stopped on request after saving; the process exits with `code` (75: resume me)."""

    def __init__(self, message: str, code: int = 75):
        super().__init__(message)
        self.code = code
