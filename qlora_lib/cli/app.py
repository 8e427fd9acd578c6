"""The application: its commands, and how they fail."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import qlora_lib
from qlora_lib.cli.finetune import finetune
from qlora_lib.cli.generate import generate
from qlora_lib.cli.memory import memory
from qlora_lib.cli.merge import merge
from qlora_lib.cli.output import explain, show_error
from qlora_lib.cli.quantize import quantize
from qlora_lib.cli.status import FAILED, INTERRUPTED, USAGE, WORDS, CommandError

# typer's name for it changed with its versions, but not what it derives from.
UsageError: Any = typer.BadParameter.__base__


class Commands(TyperGroup):
    """Turns what a command raises into a line, or a JSON object, and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words of the command line, for messages that repeat them."""
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        as_json = "--json" in ctx.meta[WORDS]
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except UsageError as error:
            if not as_json:
                raise
            show_error(error.format_message(), "UsageError", USAGE, as_json)
            code = USAGE
        except (KeyboardInterrupt, Exception) as error:
            if ctx.params["traceback"]:
                raise
            code = _exit_code(error)
            details = error.details if isinstance(error, CommandError) else {}
            name = type(error).__name__
            show_error(explain(error), name, code, as_json, **details)
        raise typer.Exit(code)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="**Exit codes**: 0 done, 1 failed, 2 wrong use of the command, "
    "3 the run does not fit on the GPU, 130 interrupted.",
)
for command in (memory, quantize, finetune, generate, merge):
    app.command(no_args_is_help=True)(command)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qlora {qlora_lib.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version and leave.",
        ),
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback",
            help="Show where an error comes from, to report it: "
            "qlora --traceback COMMAND ...",
        ),
    ] = False,
) -> None:
    """Fine-tune large language models in 4 bits, on one GPU.

    A model is an id of the hub or a folder. Results go to the standard output, progress
    and errors to the standard error. With **--json** a command prints one JSON
    object, with an "error" in it if it failed.
    """


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, CommandError) else FAILED
