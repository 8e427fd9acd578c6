"""How a command ends."""

from __future__ import annotations

from typing import Any

FAILED = 1
USAGE = 2
DOES_NOT_FIT = 3
INTERRUPTED = 130  # as shells have it: 128 and the number of SIGINT


# Under this key the context of a command keeps the words of the command line.
WORDS = "qlora_lib.words"


class CommandError(Exception):
    """A command cannot do what it was asked to.

    Args:
        message: What is wrong and what to do, in a line.
        exit_code: How the process ends.
        details: What belongs into the JSON object beside the error.
    """

    def __init__(self, message: str, exit_code: int = FAILED, **details: Any) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.details = details
