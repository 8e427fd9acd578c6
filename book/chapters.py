"""Keep the chapter notebooks true: execute, check and compare them.

Usage, from the root of the repository:

    python book/chapters.py execute [NAME ...]   run and write the outputs in place
    python book/chapters.py check   [NAME ...]   form and rules, runs nothing
    python book/chapters.py test    [NAME ...]   run and compare with the outputs

NAME is the name of a chapter's file, with or without ``.ipynb``.
Without a NAME, every chapter that ``_toc.yml`` lists is meant.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from chapter_rules import violations

ROOT = Path(__file__).resolve().parent.parent

CELL_TIMEOUT_SECONDS = 300

# The committed outputs are those of the CPU, so a run must not see a GPU.
# Two threads, because sums round differently with another number of them; and threads
# that sleep while they wait, because spinning stalls a machine that has other work.
CPU_RUN = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
}
ANY_RUN = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    # A chapter runs in book/; it may be read before the package is installed.
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    ),
}

KERNELSPEC = {
    "display_name": "Python 3 (ipykernel)",
    "language": "python",
    "name": "python3",
}
# No version: it would change with the Python of whoever ran the chapter last.
LANGUAGE_INFO = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
KEPT_CELL_METADATA = ("mystnb", "tags")


def chapter_paths(toc: Path = ROOT / "_toc.yml") -> list[Path]:
    """The chapter notebooks in the order of the book.

    An entry of ``_toc.yml`` is a page if there is a Markdown file of its name, and
    a chapter otherwise.
    """
    entries = [toc.parent / name for name in _files(yaml.safe_load(toc.read_text()))]
    return [
        entry.with_name(entry.name + ".ipynb")
        for entry in entries
        if not entry.with_name(entry.name + ".md").exists()
    ]


def canonical(notebook: NotebookNode) -> NotebookNode:
    """The one form in which a notebook is committed; the argument is left alone.

    Cells are named by their place, executed cells are numbered from 1, and whatever
    depends on the editor, the clock or the Python version is dropped. Two runs with
    the same results are then the same file, and a diff shows changes of substance.
    """
    cells = [
        _canonical_cell(cell, place) for place, cell in enumerate(notebook.cells, 1)
    ]
    executed = [cell for cell in cells if cell.get("execution_count") is not None]
    for count, cell in enumerate(executed, 1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    metadata = {"kernelspec": KERNELSPEC, "language_info": LANGUAGE_INFO}
    result = nbformat.from_dict(
        {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    )
    nbformat.validate(result)
    return result


def canonical_text(notebook: NotebookNode) -> str:
    """The bytes of the canonical form: sorted keys, indent 1, one final newline."""
    return nbformat.writes(canonical(notebook)).rstrip("\n") + "\n"


def execute(path: Path) -> None:
    """Run a chapter on the CPU in its own folder and write its canonical form."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT_SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=_environment(CPU_RUN))
    path.write_text(canonical_text(notebook), encoding="utf-8")


def check(path: Path) -> list[str]:
    """What is wrong with a chapter, each with its cure; an empty list if nothing."""
    if not path.exists():
        return ["missing: write it or take it out of _toc.yml"]
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    problems = list(violations(path.stem, canonical(notebook)))
    if text != canonical_text(notebook):
        cure = f"run `python book/chapters.py execute {path.stem}`"
        problems.append(f"not in canonical form: {cure}")
    return problems


def compare(paths: list[Path], lax: bool = False) -> int:
    """Run chapters under nbval; pytest's exit status.

    Strict: on the CPU, every output must equal the committed one. Lax: on whatever
    device there is, every cell must run and every assertion hold.
    """
    mode = ["--nbval-lax"] if lax else ["--nbval"]
    options = [f"--nbval-cell-timeout={CELL_TIMEOUT_SECONDS}", "--nbval-current-env"]
    command = [sys.executable, "-m", "pytest", *mode, *options, *map(str, paths)]
    environment = _environment({} if lax else CPU_RUN)
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    paths = _select(options.names)
    if options.command == "test":
        return compare(paths, lax=options.lax)
    run = _execute_all if options.command == "execute" else _check_all
    return run(paths)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("execute", "check", "test"):
        command = commands.add_parser(name)
        command.add_argument("names", nargs="*", metavar="NAME")
    command.add_argument(
        "--lax", action="store_true", help="use a GPU if there is one, let outputs vary"
    )
    return parser


def _select(names: list[str]) -> list[Path]:
    """The named chapters, or all of them; a file outside _toc.yml goes by its path."""
    by_name = {path.stem: path for path in chapter_paths()}
    if not names:
        return list(by_name.values())
    selected = [by_name.get(Path(name).stem, Path(name).resolve()) for name in names]
    for path in selected:
        if path.suffix != ".ipynb" or not path.exists():
            raise SystemExit(
                f"{path}: no such chapter. There are: {', '.join(by_name)}"
            )
    return selected


def _execute_all(paths: list[Path]) -> int:
    failed = False
    for path in paths:
        start = time.perf_counter()
        try:
            execute(path)
        except CellExecutionError as error:
            print(f"{path.stem}: {error}", file=sys.stderr)
            failed = True
        else:
            print(f"{path.stem}: {time.perf_counter() - start:.1f} s")
    return int(failed)


def _check_all(paths: list[Path]) -> int:
    problems = [f"{path.stem}: {text}" for path in paths for text in check(path)]
    print("\n".join(problems) or f"{len(paths)} chapters follow the rules.")
    return int(bool(problems))


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, **ANY_RUN, **changes}


def _files(node: Any) -> Iterator[str]:
    """Every ``file:`` of a table of contents, in reading order."""
    if isinstance(node, dict):
        if "file" in node:
            yield node["file"]
        for value in node.values():
            yield from _files(value)
    elif isinstance(node, list):
        for value in node:
            yield from _files(value)


def _canonical_cell(cell: NotebookNode, place: int) -> NotebookNode:
    kept = {
        key: cell.metadata[key] for key in KEPT_CELL_METADATA if key in cell.metadata
    }
    result = {
        "cell_type": cell.cell_type,
        "id": f"cell-{place:02d}",
        "metadata": {key: value for key, value in kept.items() if value},
        "source": cell.source.rstrip("\n"),
    }
    if cell.cell_type == "code":
        result["execution_count"] = cell.execution_count
        result["outputs"] = _canonical_outputs(cell.outputs)
    return nbformat.from_dict(result)


def _canonical_outputs(outputs: list[NotebookNode]) -> list[dict[str, Any]]:
    """Outputs without transient fields, neighboring pieces of one stream joined.

    How a stream is cut into pieces depends on when the kernel flushed it.
    """
    result: list[dict[str, Any]] = []
    for output in outputs:
        plain = {key: value for key, value in output.items() if key != "transient"}
        last = result[-1] if result else {}
        same_stream = plain["output_type"] == "stream" and (
            last.get("name") == plain["name"]
        )
        if same_stream:
            last["text"] += plain["text"]
        else:
            result.append(plain)
    return result


if __name__ == "__main__":
    sys.exit(main())
