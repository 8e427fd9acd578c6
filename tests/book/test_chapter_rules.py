"""Each rule accepts a good chapter and refuses one that breaks it, and it alone."""

import base64

import pytest
from nbformat import v4

from chapter_rules import MAX_FIGURE_BYTES, RULES, ignored_outputs, violations

FIGURE = {
    "image": {"alt": "A number line with four values and the boundaries between."},
    "figure": {"caption": "The toy codebook.", "name": "fig-toy"},
}

SOLUTION_END = "Its sign is lost.\n\n```{solution-end}\n```"


def markdown(source):
    return v4.new_markdown_cell(source)


def code(source, *outputs, count=1, **metadata):
    return v4.new_code_cell(
        source, outputs=list(outputs), execution_count=count, metadata=metadata
    )


def printed(text, name="stdout"):
    return v4.new_output("stream", name=name, text=text)


def image(size=100):
    png = base64.b64encode(b"x" * size).decode()
    data = {"image/png": png, "text/plain": "<Figure size 1260x540 with 1 Axes>"}
    return v4.new_output("display_data", data)


def good_cells():
    """A chapter that follows every rule; the tests below spoil it cell by cell."""
    return {
        "title": markdown("(ch-toy)=\n# 1. The toy\n\nIt has four numbers, e.g. 0.4."),
        "question": markdown("## The question\n\nCan 2 bits do?\nYes, they can."),
        "prediction": markdown(
            "## Your prediction\n\n```{admonition} Before you read on\n:class: tip\n"
            "Guess.\nThen read on.\n```"
        ),
        "hand": markdown("## By hand: four steps\n\n$$\nA. B. C.\n$$\n\n- One\n- Two"),
        "table": markdown("| A. B | C |\n|---|---|\n| Yes. No | 1 |"),
        "print": code("print(10)", printed("10\n")),
        "aside": markdown("## In a few lines\n\n```python\nA. B\n```"),
        "library": markdown("## The library\n\nIt agrees (Dettmers et al. 2023)."),
        "assert": code("assert 10 == 10"),
        "figure": code("ax = plotting.f(1)", image(), mystnb=FIGURE),
        "limits": markdown("## Where it stops being true\n\nAt 0.4, by a hair."),
        "exercises": markdown("## Exercises"),
        "exercise": markdown(
            "```{exercise} Sign\n:label: ex-toy-sign\n\nShow it.\n```"
        ),
        "solution": markdown("```{solution-start} ex-toy-sign\n:class: dropdown\n```"),
        "solved": code("print(3)", printed("3\n"), tags=["solution"]),
        "end": markdown(SOLUTION_END),
    }


def found(cells):
    return list(violations("01_toy", v4.new_notebook(cells=list(cells.values()))))


def broken(**replaced):
    cells = {**good_cells(), **replaced}
    return {name: cell for name, cell in cells.items() if cell is not None}


def test_a_good_chapter_has_no_violations():
    assert found(good_cells()) == []


BAD = {
    "must open with the title": {"title": markdown("# The toy")},
    "'# 1. ...'": {"title": markdown("# 2. The toy")},
    "16 lines of code": {"print": code("\n".join(["x = 1"] * 16))},
    "wider than 88 columns": {"print": code("x = " + "1" * 90)},
    "empty code cell": {"print": code("")},
    "two sentences in a line": {"aside": markdown("It is so. And so is this.")},
    "give each its own: Is it": {"aside": markdown("- Is it? It is.")},
    "give each its own: **Bold": {"aside": markdown("**Bold.** It is.")},
    "a sentence in two lines": {"aside": markdown("It is\nso.")},
    "in a fence. Too": {"aside": markdown("```{note}\nin a fence. Too\n```")},
    "shows one figure and nothing": {
        "figure": code("f()", image(), printed("x"), mystnb=FIGURE)
    },
    "needs 40 characters": {
        "figure": code("f()", image(), mystnb={**FIGURE, "image": {"alt": "A line."}})
    },
    "caption is missing": {
        "figure": code("f()", image(), mystnb={**FIGURE, "figure": {"name": "fig-toy"}})
    },
    "must start with 'fig-'": {
        "figure": code("f()", image(), mystnb={**FIGURE, "figure": {"caption": "A"}})
    },
    "two figures are named": {
        "solved": code("f()", image(), mystnb=FIGURE, tags=["solution"])
    },
    "draw less": {"figure": code("f()", image(MAX_FIGURE_BYTES + 1), mystnb=FIGURE)},
    "level-2 headings": {"prediction": None},
    "in this order": {
        "hand": markdown("## The library"),
        "library": markdown("## By hand"),
    },
    "needs an `assert`": {"assert": code("print(10)")},
    "no labelled {exercise}": {
        "exercise": None,
        "solution": None,
        "end": None,
        "solved": None,
    },
    "has no {solution-start}": {
        "aside": markdown(
            "```{exercise-start} B\n:label: ex-toy-b\n```\n\n```{exercise-end}\n```"
        )
    },
    "solution of an unknown exercise": {"exercise": None},
    "is not hidden": {"solution": markdown("```{solution-start} ex-toy-sign\n```")},
    "without its {solution-end}": {"end": None},
    "no exercise has a solution that is executed": {"solved": None},
    "tag 'solution' and the solution gates": {"solved": code("print(3)")},
    "gates disagree": {"print": code("print(3)", tags=["solution"])},
    "never executed": {"print": code("print(10)", count=None)},
    "raises ValueError": {
        "print": code("f()", v4.new_output("error", ename="ValueError", evalue="no"))
    },
    "writes to stderr": {"print": code("f()", printed("Warning", "stderr"))},
    "an absolute path in its output: /home/reader/x": {
        "print": code("f()", printed("in /home/reader/x"))
    },
    r"an absolute path in its output: C:\Users\x": {
        "print": code("f()", printed(r"C:\Users\x"))
    },
    "a time in its output: 0.3 s": {"print": code("f()", printed("took 0.3 s"))},
    "a time in its output: 20 ms": {"print": code("f()", printed("20 ms"))},
    "a memory address in its output": {
        "print": code(
            "f()",
            v4.new_output(
                "execute_result", {"text/plain": "<object at 0x7f00aa00bb10>"}
            ),
        )
    },
    "skipped": {"print": code("f()", tags=["nbval-skip"])},
    "skipped: every": {"print": code("# NBVAL_SKIP\nf()")},
    "nbval comment": {"print": code("# NBVAL_IGNORE_OUTPUT\nf()")},
    "ignored output without a tag": {
        "print": code("f()", tags=["nbval-ignore-output", "reason: no"])
    },
    "a reason, but no tag": {"print": code("f()", tags=["reason: it is random text"])},
}


@pytest.mark.parametrize("message", BAD)
def test_a_broken_rule_is_reported(message):
    problems = found(broken(**BAD[message]))
    assert any(message in problem for problem in problems), problems


def test_every_rule_is_broken_by_some_bad_chapter():
    notebooks = [
        v4.new_notebook(cells=[*broken(**bad).values()]) for bad in BAD.values()
    ]
    for rule in RULES:
        assert any(list(rule(notebook)) for notebook in notebooks), rule.__name__


@pytest.mark.parametrize(
    "text",
    [
        "shape (4096, 64)",
        "4.127 bits per parameter",
        "3/7 and 1/2/3",
        "https://example.org/a/b",
        "[3, 1, 2, 2]",
        "14 steps",
    ],
)
def test_ordinary_output_is_no_violation(text):
    assert found(broken(print=code("f()", printed(text)))) == []


@pytest.mark.parametrize(
    "text",
    [
        "As Dettmers et al. Show, i.e. They say so.",
        "See J. Smith.",
        "A wide $x$ is 3.5. ",
        "1. First.\n2. Second.",
        "- An item\n- Another item",
        "It lists:\n- An item",
        "{cite:t}`key` says so.\nIt is `so.`",
        "He asks (why?).\nNobody knows.",
        "````{note}\nYes.\n\n```python\nA. B\n```\nNo.\n````",
    ],
)
def test_ordinary_prose_is_no_violation(text):
    assert found(broken(aside=markdown(text))) == []


def test_ignored_outputs_are_counted():
    tags = ["nbval-ignore-output", "reason: the text is sampled"]
    cells = broken(print=code("f()", printed("x"), tags=tags))
    assert found(cells) == []
    assert ignored_outputs(v4.new_notebook(cells=list(cells.values()))) == 1
    assert ignored_outputs(v4.new_notebook(cells=list(good_cells().values()))) == 0
