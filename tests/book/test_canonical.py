"""The canonical form: the same results are the same bytes, whoever ran them."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from chapters import ROOT, canonical, canonical_text, chapter_paths, execute


def code(source, outputs=(), count=None, **metadata):
    return v4.new_code_cell(
        source, outputs=list(outputs), execution_count=count, metadata=metadata
    )


def stream(text, name="stdout"):
    return v4.new_output("stream", name=name, text=text)


def test_cells_are_named_by_their_place():
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("a"), code("b")])
    assert [cell.id for cell in canonical(notebook).cells] == ["cell-01", "cell-02"]


def test_executed_cells_are_numbered_and_others_stay_unnumbered():
    result = v4.new_output("execute_result", {"text/plain": "1"}, execution_count=9)
    notebook = v4.new_notebook(
        cells=[code("1", [result], 9), code("2"), code("3", (), 4)]
    )
    cells = canonical(notebook).cells
    assert [cell.execution_count for cell in cells] == [1, None, 2]
    assert cells[0].outputs[0].execution_count == 1


def test_what_an_editor_or_a_clock_leaves_is_dropped():
    timing = {"iopub.execute_input": "2001-01-01T00:00:00Z"}
    cell = code(
        "1", tags=["solution"], execution=timing, collapsed=True, editable=False
    )
    notebook = v4.new_notebook(cells=[cell], metadata={"widgets": {}})
    notebook.metadata["language_info"] = {"name": "python", "version": "3.0.0"}
    result = canonical(notebook)
    assert result.cells[0].metadata == {"tags": ["solution"]}
    assert set(result.metadata) == {"kernelspec", "language_info"}
    assert "version" not in result.metadata.language_info
    assert result.metadata.kernelspec.name == "python3"


def test_neighboring_pieces_of_a_stream_are_joined():
    outputs = [stream("a"), stream("b"), stream("c", "stderr"), stream("d")]
    (cell,) = canonical(v4.new_notebook(cells=[code("1", outputs)])).cells
    assert [(o.name, o.text) for o in cell.outputs] == [
        ("stdout", "ab"),
        ("stderr", "c"),
        ("stdout", "d"),
    ]


def test_the_argument_is_left_alone():
    notebook = v4.new_notebook(cells=[code("1", [stream("a"), stream("b")], 7)])
    before = json.dumps(notebook)
    canonical(notebook)
    assert json.dumps(notebook) == before


def test_text_is_sorted_and_a_fixed_point():
    notebook = v4.new_notebook(cells=[code("1", [stream("é")], 3)])
    text = canonical_text(notebook)
    assert canonical_text(nbformat.reads(text, as_version=4)) == text
    pretty = json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False)
    assert text == pretty + "\n"


def test_execution_is_on_the_cpu_in_the_folder_of_the_chapter(tmp_path):
    source = "import os\nprint(repr(os.environ['CUDA_VISIBLE_DEVICES']))\n"
    source += "print(os.listdir('.'))"
    path = tmp_path / "01_chapter.ipynb"
    nbformat.write(v4.new_notebook(cells=[code(source)]), path)
    execute(path)
    text = path.read_text()
    (cell,) = nbformat.reads(text, as_version=4).cells
    assert cell.outputs[0].text == "''\n['01_chapter.ipynb']\n"
    execute(path)
    assert path.read_text() == text


def test_pages_are_no_chapters(tmp_path):
    (tmp_path / "page.md").touch()
    toc = tmp_path / "_toc.yml"
    toc.write_text("root: intro\nparts:\n- chapters:\n  - file: 01_a\n  - file: page\n")
    assert chapter_paths(toc) == [tmp_path / "01_a.ipynb"]


def run(*arguments):
    command = [sys.executable, Path("book/chapters.py"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_check_names_the_cure(tmp_path):
    path = tmp_path / "01_chapter.ipynb"
    nbformat.write(v4.new_notebook(cells=[v4.new_markdown_cell("# 1. A")]), path)
    result = run("check", path)
    assert result.returncode == 1
    assert (
        "not in canonical form: run `python book/chapters.py execute" in result.stdout
    )


def test_a_cell_that_raises_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "01_chapter.ipynb"
    nbformat.write(v4.new_notebook(cells=[code("1 / 0")]), path)
    before = path.read_bytes()
    result = run("execute", path)
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr
    assert path.read_bytes() == before


def test_an_unknown_chapter_is_named():
    result = run("check", "99_nothing")
    assert result.returncode == 1
    assert "no such chapter" in result.stderr


@pytest.mark.parametrize(("printed", "status"), [("1", 0), ("2", 1)])
def test_comparison_fails_on_a_changed_output(tmp_path, printed, status):
    path = tmp_path / "01_chapter.ipynb"
    cells = [code("print(1)", [stream(f"{printed}\n")], 1)]
    path.write_text(canonical_text(v4.new_notebook(cells=cells)))
    assert run("test", path).returncode == status
    assert run("test", "--lax", path).returncode == 0
