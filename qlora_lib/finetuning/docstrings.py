"""Docstring pairs from the reader's own Python standard library.

The fine-tuning task of the book is small enough for a laptop and needs no download:
given the source of a function without its docstring, write the first line of that
docstring. Every reader has the data, because every reader has a standard library.

The split is by top-level module, decided by a checksum of its name. A module that is
held out is never trained on, neither here nor when the base model is pretrained.
"""

import ast
import io
import re
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_lib.finetuning.data import InstructionPair

INSTRUCTION = "\n\n# Docstring:\n"
"""The cue between the source and the answer, which no prompt loses."""

HELD_OUT_SHARE = 8
"""One module in this many is held out."""

MIN_SOURCE_CHARACTERS, MAX_SOURCE_CHARACTERS = 60, 2000
MIN_SUMMARY_WORDS, MAX_SUMMARY_CHARACTERS = 3, 100

# Test suites, demonstrations, vendored wheels and generated tables: not library code.
_SKIPPED_DIRECTORIES = frozenset(
    "test tests idlelib lib2to3 turtledemo pydoc_data ensurepip _bundled "
    "site-packages dist-packages lib-dynload __pycache__ __phello__".split()
)
_SKIPPED_MODULES = ("__hello__", "antigravity", "this", "_sysconfigdata")

_SENTENCE = re.compile(r"[A-Z][^\n]*[^.\s]\.")


@dataclass(frozen=True)
class DocstringPair:
    """One example: a function and the sentence that describes it.

    Attributes:
        module: Dotted name of the module, such as ``"json.decoder"``.
        name: Qualified name inside the module, such as ``"JSONDecoder.decode"``.
        source: Source of the function without its docstring, dedented.
        summary: First line of its docstring, a whole sentence.
    """

    module: str
    name: str
    source: str
    summary: str

    def as_instruction(self) -> InstructionPair:
        """Return the pair as what any model is fine-tuned on.

        The source is the prompt, :data:`INSTRUCTION` its cue, the summary the answer.
        """
        return InstructionPair(self.source, self.summary, cue=INSTRUCTION)


def is_held_out(module: str) -> bool:
    """Whether a module is kept away from every training run.

    The decision is ``crc32(top-level name) % 8 == 0``. It is the same on every
    machine and Python version, which the built-in ``hash`` is not.

    Args:
        module: Dotted module name; only the part before the first dot counts.
    """
    top_level = module.partition(".")[0]
    return zlib.crc32(top_level.encode()) % HELD_OUT_SHARE == 0


def standard_library_files(root: Path | None = None) -> list[tuple[str, Path]]:
    """List the modules of the standard library as (dotted name, file), by name.

    Test suites, demonstrations, generated tables and installed packages are left out.

    Args:
        root: Folder of the standard library; by default that of the running Python.

    Raises:
        FileNotFoundError: If ``root`` holds no Python file.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root).with_suffix("")
        if _SKIPPED_DIRECTORIES.intersection(relative.parts[:-1]):
            continue
        if relative.parts[0].startswith(_SKIPPED_MODULES):
            continue
        parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        files.append((".".join(parts), path))
    if not files:
        raise FileNotFoundError(
            f"root={str(root)!r} holds no Python source file; pass the folder of a "
            "standard library that is installed with its sources"
        )
    return sorted(files)


def extract_pairs(text: str, module: str) -> list[DocstringPair]:
    """Extract the pairs of one source file, in the order of the file.

    Module-level functions and methods count; functions inside functions do not. A
    function is left out when it is tiny or gigantic, when its first docstring line is
    no sentence, or when that sentence also stands in its source.

    Args:
        text: Python source.
        module: Dotted module name that the pairs carry.

    Raises:
        SyntaxError: If ``text`` is not Python.
    """
    # The parser counts newlines alone; splitlines() would also cut at form feeds, which
    # some files of the standard library hold.
    lines = io.StringIO(text).readlines()
    pairs = []
    for name, function in _functions(ast.parse(text)):
        summary = _summary(function)
        source = _source_without_docstring(function, lines)
        if summary and source and summary not in source:
            pairs.append(DocstringPair(module, name, source, summary))
    return pairs


def standard_library_pairs(
    root: Path | None = None,
) -> tuple[list[DocstringPair], list[DocstringPair]]:
    """Extract all pairs of the library, split by module.

    A function whose source occurs twice in the library counts once, where it first
    occurs, so that no copy of a training example is held out.

    Args:
        root: Folder of the standard library; by default that of the running Python.

    Returns:
        The pairs to train on and the held-out pairs, each sorted by module.

    Raises:
        FileNotFoundError: If ``root`` holds no Python file.
    """
    seen: set[str] = set()
    train: list[DocstringPair] = []
    held_out: list[DocstringPair] = []
    for module, path in standard_library_files(root):
        side = held_out if is_held_out(module) else train
        for pair in extract_pairs(path.read_text(encoding="utf-8"), module):
            if pair.source not in seen:
                seen.add(pair.source)
                side.append(pair)
    return train, held_out


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(
    node: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, _Function]]:
    for child in node.body:
        if isinstance(child, _Function):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")


def _summary(function: _Function) -> str | None:
    docstring = ast.get_docstring(function)
    if not docstring:
        return None
    summary = docstring.splitlines()[0].strip()
    is_sentence = (
        _SENTENCE.fullmatch(summary)
        and len(summary.split()) >= MIN_SUMMARY_WORDS
        and len(summary) <= MAX_SUMMARY_CHARACTERS
    )
    return summary if is_sentence else None


def _source_without_docstring(function: _Function, lines: list[str]) -> str | None:
    # Cutting lines, not ast.unparse, keeps comments and the author's formatting.
    docstring, *rest = function.body
    if not rest or rest[0].lineno <= (docstring.end_lineno or docstring.lineno):
        return None
    if docstring.lineno == function.lineno:
        return None
    first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
    kept = (
        lines[first - 1 : docstring.lineno - 1]
        + lines[docstring.end_lineno : function.end_lineno]
    )
    source = textwrap.dedent("".join(kept)).rstrip()
    if not MIN_SOURCE_CHARACTERS <= len(source) <= MAX_SOURCE_CHARACTERS:
        return None
    try:
        ast.parse(source)
    except SyntaxError:  # text in a multi-line string stood left of the function
        return None
    return source
