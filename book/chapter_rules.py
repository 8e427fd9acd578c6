"""The rules that every chapter follows, each as a function from chapter to problems.

CONTRIBUTING.md, section "A chapter", says why; the messages here say how to mend.
"""

import base64
import re
from collections.abc import Iterator

from nbformat import NotebookNode

SECTIONS = (
    "The question",
    "Your prediction",
    "By hand",
    "The library",
    "Where it stops being true",
    "Exercises",
)

MAX_CODE_LINES = 15
MAX_CODE_COLUMNS = 88
MIN_ALT_CHARACTERS = 40
MAX_FIGURE_BYTES = 100_000


def violations(name: str, notebook: NotebookNode) -> Iterator[str]:
    """Everything that is wrong with a chapter of this file name."""
    yield from title_carries_number(name, notebook)
    for rule in RULES:
        yield from rule(notebook)


def title_carries_number(name: str, notebook: NotebookNode) -> Iterator[str]:
    number = int(name.split("_")[0])
    if not re.match(rf"(\([\w-]+\)=\n)?# {number}\. \S", notebook.cells[0].source):
        yield f"the first cell must open with the title '# {number}. ...'"


def code_fits_a_glance(notebook: NotebookNode) -> Iterator[str]:
    for cell in _code(notebook):
        lines = cell.source.splitlines()
        if not lines:
            yield f"{cell.id}: empty code cell: delete it"
        if len(lines) > MAX_CODE_LINES:
            cure = "split it, or move it to qlora_lib with a test"
            yield f"{cell.id}: {len(lines)} lines of code, {MAX_CODE_LINES} fit: {cure}"
        for line in lines:
            if len(line) > MAX_CODE_COLUMNS:
                yield f"{cell.id}: wider than {MAX_CODE_COLUMNS} columns: {line}"


def one_sentence_a_line(notebook: NotebookNode) -> Iterator[str]:
    for cell in _markdown(notebook):
        continued = False
        for line in _prose_lines(cell.source):
            text = _LIST_MARKER.sub("", line).strip()
            if _SENTENCE_BREAK.search(_ABBREVIATION.sub("", text)):
                yield f"{cell.id}: two sentences in a line, give each its own: {text}"
            if continued and text and not _LIST_MARKER.match(line):
                yield f"{cell.id}: a sentence in two lines, join them: {text}"
            continued = bool(text) and not _SENTENCE_END.search(text)


def figures_are_described(notebook: NotebookNode) -> Iterator[str]:
    names: list[str] = []
    for cell in _code(notebook):
        images = [output for output in cell.outputs if _image_bytes(output)]
        if not images:
            continue
        if len(cell.outputs) != 1:
            cure = "one figure and nothing else: write `ax = plotting.f(...)`"
            yield f"{cell.id}: a cell that draws shows {cure}"
        if _image_bytes(images[0]) > MAX_FIGURE_BYTES:
            yield f"{cell.id}: figure above {MAX_FIGURE_BYTES} bytes: draw less"
        mystnb = cell.metadata.get("mystnb", {})
        figure = mystnb.get("figure", {})
        if len(mystnb.get("image", {}).get("alt", "")) < MIN_ALT_CHARACTERS:
            where = "metadata mystnb.image.alt"
            yield f"{cell.id}: {where} needs {MIN_ALT_CHARACTERS} characters or more"
        if not figure.get("caption"):
            yield f"{cell.id}: metadata mystnb.figure.caption is missing"
        if not figure.get("name", "").startswith("fig-"):
            yield f"{cell.id}: metadata mystnb.figure.name must start with 'fig-'"
        names.append(figure.get("name", ""))
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two figures are named {name!r}: give each its own name"


def sections_in_order(notebook: NotebookNode) -> Iterator[str]:
    found = [section for section in map(_section_of, _headings(notebook)) if section]
    if found != list(SECTIONS):
        yield (
            "the level-2 headings must include, once each and in this order, "
            f"{list(SECTIONS)} (words may follow after a colon), but are {found}"
        )


def library_is_asserted(notebook: NotebookNode) -> Iterator[str]:
    section: str | None = None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for heading in _headings_of(cell):
                section = _section_of(heading) or section
        elif section == "The library" and re.search(r"^\s*assert ", cell.source, re.M):
            return
    yield "section 'The library' needs an `assert` that it agrees with 'By hand'"


def exercises_are_solved(notebook: NotebookNode) -> Iterator[str]:
    text = "\n".join(cell.source for cell in _markdown(notebook))
    exercises = set(re.findall(r"{exercise(?:-start)?}[^\n]*\n:label: (\S+)", text))
    solutions = re.findall(r"{solution-start} (\S+)\n((?::.*\n)*)", text)
    if not exercises:
        yield "no labelled {exercise}: a chapter ends with exercises"
    for label in sorted(exercises - {label for label, _ in solutions}):
        yield f"exercise {label} has no {{solution-start}}"
    for label, options in solutions:
        if label not in exercises:
            yield f"solution of an unknown exercise {label}"
        if not re.search(r"^:class: .*\bdropdown\b", options, re.M):
            yield f"solution {label} is not hidden: add the option ':class: dropdown'"
    yield from _solution_cells(notebook)


def cells_are_executed(notebook: NotebookNode) -> Iterator[str]:
    missed = [cell.id for cell in _code(notebook) if cell.execution_count is None]
    if missed:
        yield f"never executed: run `make chapters` for {', '.join(missed)}"


def outputs_are_the_same_elsewhere(notebook: NotebookNode) -> Iterator[str]:
    for cell in _code(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"{cell.id}: raises {output.ename}: {output.evalue}"
            if output.get("name") == "stderr":
                yield f"{cell.id}: writes to stderr, so a reader sees: {output.text}"
            for kind, pattern in _UNREPEATABLE.items():
                for match in re.findall(pattern, _text_of(output)):
                    yield f"{cell.id}: {kind} in its output: {match}"


def ignored_outputs_have_reasons(notebook: NotebookNode) -> Iterator[str]:
    for cell in _code(notebook):
        tags = cell.metadata.get("tags", [])
        reasons = [tag for tag in tags if re.match(r"reason: \S.{9,}", tag)]
        if "nbval-skip" in tags or "NBVAL_SKIP" in cell.source:
            yield f"{cell.id}: skipped: every cell of a chapter runs in the tests"
        if "NBVAL_" in cell.source:
            yield f"{cell.id}: nbval comment: use the tag 'nbval-ignore-output'"
        if _IGNORING & set(tags) and not reasons:
            yield f"{cell.id}: ignored output without a tag 'reason: ...'"
        if reasons and not _IGNORING & set(tags):
            yield f"{cell.id}: a reason, but no tag 'nbval-ignore-output'"


def ignored_outputs(notebook: NotebookNode) -> int:
    """How many cells nbval runs without comparing what they show."""
    return sum(
        bool(_IGNORING & set(c.metadata.get("tags", []))) for c in _code(notebook)
    )


RULES = (
    code_fits_a_glance,
    one_sentence_a_line,
    figures_are_described,
    sections_in_order,
    library_is_asserted,
    exercises_are_solved,
    cells_are_executed,
    outputs_are_the_same_elsewhere,
    ignored_outputs_have_reasons,
)

_IGNORING = {"nbval-ignore-output", "raises-exception", "nbval-raises-exception"}

_UNREPEATABLE = {
    "an absolute path": r"(?<![\w.:/])/(?:[\w.-]+/)+[\w.-]*|\b[A-Z]:\\\S+",
    "a time": r"\b[\d.]+ ?(?:[mnµu]?s|secs?|seconds|min|minutes|it/s)\b",
    "a memory address": r"\b0x[0-9a-f]{8,}\b",
}

_LIST_MARKER = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s+|^\s*(?:\[\^?\w+\]:|:)\s+|^>\s*")
_ABBREVIATION = re.compile(
    r"^\W*\d+\.|\b(?:al|e\.g|i\.e|vs|cf|[Ff]igs?|[Ee]qs?|[Ss]ec|[A-Z])\."
)
_CLOSERS = r"""["'”’)\]*_`$]*"""
_SENTENCE_BREAK = re.compile(rf"\w{_CLOSERS}[.?!]{_CLOSERS}\s+[\"'“‘(\[*_`]*[A-Z]")
_SENTENCE_END = re.compile(rf"[.?!:;]{_CLOSERS}$")
# Directives whose content is no prose; so is a fence that is no directive.
_LITERAL = re.compile(r"{(?:math|code|code-cell|figure|image|table|list-table|raw)}")


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _markdown(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def _headings(notebook: NotebookNode) -> list[str]:
    return [text for cell in _markdown(notebook) for text in _headings_of(cell)]


def _headings_of(cell: NotebookNode) -> list[str]:
    return re.findall(r"^## (.+)$", cell.source, re.M)


def _section_of(heading: str) -> str | None:
    start = heading.split(":")[0].strip()
    return start if start in SECTIONS else None


def _prose_lines(source: str) -> Iterator[str]:
    """The lines that hold sentences; an empty line for each that separates them."""
    fences: list[tuple[str, bool]] = []
    in_math = False
    for line in source.splitlines():
        stripped = line.strip()
        fence = re.match(r"(`{3,}|:{3,}|~{3,})(.*)", stripped)
        if fence and fences and not fence[2] and fence[1] == fences[-1][0]:
            fences.pop()
        elif fence:
            directive = fence[2].startswith("{")
            fences.append((fence[1], not directive or bool(_LITERAL.match(fence[2]))))
        elif stripped == "$$" or stripped.count("$$") == 1:
            in_math = not in_math
        elif not in_math and not any(literal for _, literal in fences):
            structure = re.match(r"#|\||\(.*\)=$|:[\w-]+:|---|<|\$\$", stripped)
            yield "" if structure else line
            continue
        yield ""


def _solution_cells(notebook: NotebookNode) -> Iterator[str]:
    """A tag `solution` on the code between the gates, on no other, and on at least one.

    The tag tells tools that do not read MyST which cells are solutions.
    """
    inside, solved = False, False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            gates = re.findall(r"{solution-(start|end)}", cell.source)
            inside = gates[-1] == "start" if gates else inside
        else:
            tagged = "solution" in cell.metadata.get("tags", [])
            solved |= inside
            if inside != tagged:
                yield f"{cell.id}: the tag 'solution' and the solution gates disagree"
    if inside:
        yield "a {solution-start} without its {solution-end}"
    if not solved:
        yield "no exercise has a solution that is executed"


def _image_bytes(output: NotebookNode) -> int:
    """Size of the image that an output shows, 0 if it shows none."""
    data = output.get("data", {})
    if "image/png" in data:
        return len(base64.b64decode(data["image/png"]))
    return len(data.get("image/svg+xml", ""))


def _text_of(output: NotebookNode) -> str:
    data = output.get("data", {})
    return "\n".join(
        [output.get("text", ""), *map(str, data.get("text/plain", "").splitlines())]
    )
