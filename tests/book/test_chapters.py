"""Every chapter of the table of contents is in its form and follows the rules."""

import nbformat
import pytest
import yaml

from chapter_rules import ignored_outputs
from chapters import ROOT, chapter_paths, check

CHAPTERS = chapter_paths()

# Outputs that nbval runs without comparing them. Each is a hole in the comparison:
# count a new one here only with a reason in its cell's tags that convinces.
IGNORED_OUTPUTS = 12


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_is_canonical_and_follows_the_rules(path):
    assert check(path) == []


def test_ignored_outputs_are_counted():
    notebooks = [nbformat.read(path, as_version=4) for path in CHAPTERS]
    assert sum(map(ignored_outputs, notebooks)) == IGNORED_OUTPUTS


def test_every_notebook_of_the_book_is_in_the_table_of_contents():
    assert sorted((ROOT / "book").glob("*.ipynb")) == sorted(CHAPTERS)


def test_chapters_come_in_the_order_of_their_numbers():
    assert [path.name for path in CHAPTERS] == sorted(path.name for path in CHAPTERS)


def test_labels_are_unique_in_the_book():
    """Sphinx would take the last of two figures or exercises of one name."""
    labels = []
    for path in CHAPTERS:
        for cell in nbformat.read(path, as_version=4).cells:
            figure = cell.metadata.get("mystnb", {}).get("figure", {})
            labels += [figure["name"]] if "name" in figure else []
    assert len(labels) == len(set(labels))


def test_build_turns_on_what_the_chapters_rely_on():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["execute"]["execute_notebooks"] == "off"
    assert config["only_build_toc_files"] is True
    assert "sphinx_exercise" in config["sphinx"]["extra_extensions"]
