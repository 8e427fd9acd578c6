"""What the README says is so."""

import doctest
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_prints_what_it_shows():
    (block,) = re.findall(r"```pycon\n(.*?)```", README, re.S)
    example = doctest.DocTestParser().get_doctest(block, {}, "README.md", None, 0)
    assert len(example.examples) >= 6
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
        example
    )
    assert results.failed == 0


def test_the_files_it_names_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    layout = re.search(r"```text\n(.*?)```", README, re.S)[1]
    for line in layout.splitlines():
        assert (ROOT / line.split()[0]).exists(), line
