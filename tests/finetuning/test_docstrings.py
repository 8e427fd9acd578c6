"""The docstring pairs: real, and split by module."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest

from qlora_lib.finetuning.data import InstructionPair
from qlora_lib.finetuning.docstrings import (
    INSTRUCTION,
    MAX_SOURCE_CHARACTERS,
    MIN_SOURCE_CHARACTERS,
    DocstringPair,
    extract_pairs,
    is_held_out,
    standard_library_files,
    standard_library_pairs,
)

FUNCTION = '''
def area(width, height):
    """Return the area of a rectangle.

    Both sides are in meters.
    """
    # A negative side is a mistake of the caller.
    if width < 0 or height < 0:
        raise ValueError("negative side")
    return width * height
'''
BODY = (
    "    if width < 0:\n        raise ValueError('negative side')\n    return width\n"
)


@pytest.fixture(scope="module")
def library_pairs() -> tuple[list[DocstringPair], list[DocstringPair]]:
    return standard_library_pairs()


@pytest.fixture(scope="module")
def train_pairs(
    library_pairs: tuple[list[DocstringPair], list[DocstringPair]],
) -> list[DocstringPair]:
    return library_pairs[0]


@pytest.fixture(scope="module")
def held_out_pairs(
    library_pairs: tuple[list[DocstringPair], list[DocstringPair]],
) -> list[DocstringPair]:
    return library_pairs[1]


# Extraction


def test_a_pair_is_the_function_and_its_first_docstring_line() -> None:
    (pair,) = extract_pairs(FUNCTION, "geometry")
    assert pair == DocstringPair(
        module="geometry",
        name="area",
        source=(
            "def area(width, height):\n"
            "    # A negative side is a mistake of the caller.\n"
            "    if width < 0 or height < 0:\n"
            '        raise ValueError("negative side")\n'
            "    return width * height"
        ),
        summary="Return the area of a rectangle.",
    )


def test_a_pair_asks_for_the_summary_of_a_source() -> None:
    (pair,) = extract_pairs(FUNCTION, "geometry")
    assert pair.as_instruction() == InstructionPair(
        prompt=pair.source, answer=pair.summary, cue=INSTRUCTION
    )


def test_a_form_feed_does_not_shift_the_lines_of_the_source() -> None:
    (plain,) = extract_pairs(FUNCTION, "m")
    (pair,) = extract_pairs(f"\f\n{FUNCTION}", "m")
    assert pair == plain
    (pair,) = extract_pairs(f"first = 1\f\nsecond = 2\n{FUNCTION}", "m")
    assert pair == plain


def test_methods_are_dedented_and_keep_their_decorators() -> None:
    method = textwrap.indent("@cached\n" + FUNCTION.strip(), " " * 8)
    (pair,) = extract_pairs(f"class Outer:\n    class Inner:\n{method}\n", "m")
    assert pair.name == "Outer.Inner.area"
    assert pair.source.startswith("@cached\ndef area(width, height):\n    #")


def test_coroutines_count_and_functions_inside_functions_do_not() -> None:
    inner = textwrap.indent(FUNCTION, "    ")
    text = f"async {FUNCTION.strip()}\n\ndef outer():{inner}\n    return area\n"
    (pair,) = extract_pairs(text, "m")
    assert pair.source.startswith("async def area")


@pytest.mark.parametrize(
    ("docstring", "counts"),
    [
        ("Return the area.", True),
        ("Return the area.\n\n    More.", True),
        ("", False),
        ("Two words.", False),
        ("no capital letter at the start.", False),
        ("No full stop at the end", False),
        ("The first line goes\n    on in the second.", False),
        ("The first line trails off ...", False),
        ("The first line goes on " + "and on " * 12 + "until its end.", False),
        ("width(x) -> the same", False),
    ],
)
def test_only_a_first_line_that_is_a_sentence_counts(
    docstring: str, counts: bool
) -> None:
    text = f'def area(width):\n    """{docstring}"""\n{BODY}'
    assert len(extract_pairs(text, "m")) == counts


@pytest.mark.parametrize(
    "text",
    [
        # No docstring; nothing but a docstring; all in one line.
        f"def area(width):\n{BODY}",
        'def area(width_of_the_rectangle, height_of_it):\n    """Return the area."""\n',
        'def area(width_of_the_rectangle): """Return the area."""; return 1 + 2 + 3\n',
        # The answer also stands in the source.
        f'def area(width):\n    """Return the area."""\n    # Return the area.\n{BODY}',
        # Tiny, gigantic.
        'def area(width):\n    """Return the area."""\n    return width\n',
        'def area(width):\n    """Return the area."""\n' + BODY * 40,
        "",
    ],
)
def test_functions_that_make_no_pair_are_left_out(text: str) -> None:
    ast.parse(text)
    assert extract_pairs(text, "m") == []


def test_text_left_of_the_function_in_a_string_is_left_out_not_mangled() -> None:
    text = (
        'class A:\n    def usage(self):\n        """Print how to use it."""\n'
        '        print("""one long line of help\nat the left margin of the file""")\n'
    )
    ast.parse(text)
    assert extract_pairs(text, "m") == []


def test_text_that_is_no_python_raises() -> None:
    with pytest.raises(SyntaxError):
        extract_pairs("def area(:", "m")


# The standard library


def test_the_pairs_are_real(
    train_pairs: list[DocstringPair], held_out_pairs: list[DocstringPair]
) -> None:
    assert len(train_pairs) > 1500
    assert len(held_out_pairs) > 250
    by_name = {(pair.module, pair.name): pair for pair in train_pairs}
    pair = by_name["textwrap", "dedent"]
    function = importlib.import_module("textwrap").dedent
    assert pair.summary == inspect.getdoc(function).splitlines()[0]
    # The code that is left compiles to the code of the library, docstring aside.
    ours, theirs = ast.parse(pair.source), ast.parse(inspect.getsource(function))
    del theirs.body[0].body[0]
    assert ast.dump(ours) == ast.dump(theirs)


def test_no_docstring_leaks_into_the_source(
    train_pairs: list[DocstringPair], held_out_pairs: list[DocstringPair]
) -> None:
    for pair in train_pairs + held_out_pairs:
        (function,) = ast.parse(pair.source).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert function.name == pair.name.rpartition(".")[2]
        assert pair.summary not in pair.source
        assert pair.summary[0].isupper() and pair.summary.endswith(".")
        assert "\n" not in pair.summary
        assert MIN_SOURCE_CHARACTERS <= len(pair.source) <= MAX_SOURCE_CHARACTERS


def test_the_split_is_disjoint_and_complete(
    train_pairs: list[DocstringPair], held_out_pairs: list[DocstringPair]
) -> None:
    def modules(pairs: list[DocstringPair]) -> set[str]:
        return {pair.module.partition(".")[0] for pair in pairs}

    assert modules(train_pairs).isdisjoint(modules(held_out_pairs))
    assert not any(is_held_out(pair.module) for pair in train_pairs)
    assert all(is_held_out(pair.module) for pair in held_out_pairs)
    sources = [pair.source for pair in train_pairs + held_out_pairs]
    assert len(set(sources)) == len(sources)
    found = {
        pair.source
        for module, path in standard_library_files()
        for pair in extract_pairs(path.read_text(encoding="utf-8"), module)
    }
    assert found == set(sources)


def test_the_split_is_the_same_on_every_machine() -> None:
    assert is_held_out("asyncio") and is_held_out("asyncio.events")
    assert is_held_out("unittest.mock") and is_held_out("_pydecimal")
    assert not is_held_out("json") and not is_held_out("email.message")
    assert is_held_out("asyncio") == (zlib.crc32(b"asyncio") % 8 == 0)


def test_the_order_does_not_depend_on_the_hash_seed(
    held_out_pairs: list[DocstringPair],
) -> None:
    program = (
        "from qlora_lib.finetuning.docstrings import standard_library_pairs as pairs\n"
        "print(*[(p.module, p.name) for p in pairs()[1]], sep='\\n')"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = [str((pair.module, pair.name)) for pair in held_out_pairs]
    assert printed.splitlines() == expected


def test_files_are_library_modules_in_order(tmp_path: Path) -> None:
    for name in (
        "b.py",
        "a/__init__.py",
        "a/c.py",
        "a/test/d.py",
        "test/e.py",
        "idlelib/f.py",
        "site-packages/numpy/g.py",
        "this.py",
        "a/data.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FUNCTION)
    listed = standard_library_files(tmp_path)
    assert [name for name, _ in listed] == ["a", "a.c", "b"]
    # The same function three times is one pair.
    train, held_out = standard_library_pairs(tmp_path)
    assert [pair.module for pair in train + held_out] == ["a"]


def test_a_folder_without_python_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="root="):
        standard_library_files(tmp_path)
