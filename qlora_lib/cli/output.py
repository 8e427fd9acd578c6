"""What commands print: results on the standard output, all else on the other."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, RenderableType

from qlora_lib.cli.status import CommandError

if TYPE_CHECKING:
    from transformers import TrainerCallback

# What a user of the command can do nothing about.
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def say(message: str) -> None:
    """Print a line on the standard error."""
    print(message, file=sys.stderr, flush=True)


def show_result(
    result: Mapping[str, Any], as_json: bool, *text: str | RenderableType
) -> None:
    """Print the result of a command, for a program or for a reader."""
    if as_json:
        print(json.dumps(_without_nan(result), allow_nan=False))
        return
    for each in text:
        if isinstance(each, str):
            print(each)  # rich would take [] and :: in it for markup
        else:
            Console().print(each)


def show_error(
    message: str, kind: str, exit_code: int, as_json: bool, **details: Any
) -> None:
    """Print why a command has failed."""
    if as_json:
        error = {"type": kind, "message": message, "exit_code": exit_code}
        show_result({"error": error, **details}, as_json)
    else:
        say(f"error: {message}")


def explain(error: BaseException) -> str:
    """Say in a line what has happened and what to do."""
    said = _explain(error, " ".join(str(error).split()))
    return ". ".join([said, *getattr(error, "__notes__", [])])


def _explain(error: BaseException, text: str) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory ({text}): `qlora memory` shows what would fit"
    # safetensors and torch.save have errors of their own for it.
    if getattr(error, "errno", None) == errno.ENOSPC or any(
        sign in text for sign in ("No space left", "file write failed")
    ):
        return (
            f"the disk is full ({text}): free some space; what was whole before the "
            "command is whole"
        )
    if isinstance(error, CommandError | OSError | ValueError | ImportError):
        return text
    return (
        f"{type(error).__name__}: {text}. This is a defect: please report it with what "
        "`qlora --traceback COMMAND ...` shows"
    )


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Keep the standard output for the result, and the other one readable.

    Progress bars are for terminals; elsewhere they would fill a log.
    """
    from transformers.utils import logging as transformers_logging

    bars_were_on = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    # Where it is installed peft imports it, and it logs what it could do better.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logger, handler = logging.getLogger("qlora_lib"), _Saying()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = _say_warning
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        if bars_were_on:
            transformers_logging.enable_progress_bar()


def log_lines() -> list[TrainerCallback]:
    """Callbacks that say the loss now and then, where no terminal shows a bar."""
    from transformers import TrainerCallback

    class LogLines(TrainerCallback):
        def on_log(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            loss = (kwargs.get("logs") or {}).get("loss")
            every = max(1, state.max_steps // 20)
            if loss is not None and state.global_step % every == 0:
                say(f"Step {state.global_step} of {state.max_steps}: loss {loss:.3f}")

    return [LogLines()]


class _Saying(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def _say_warning(
    message: Warning | str, category: type[Warning], *unused: Any, **also_unused: Any
) -> None:
    if not issubclass(category, FOR_DEVELOPERS):
        say(f"warning: {' '.join(str(message).split())}")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
