"""Folders are written whole or not at all, whatever ends the writing."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lib.finetuning.saving import whole_folder


def content(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_text()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def fill(path: Path, text: str, **options: bool) -> None:
    with whole_folder(path, **options) as folder:
        (folder / "inner").mkdir()
        (folder / "a").write_text(text)
        (folder / "inner" / "b").write_text(text)


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "adapter"
    with whole_folder(path) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
        assert folder.parent == path.parent
    assert content(path) == {"a": "1"}
    assert [p.name for p in path.parent.iterdir()] == ["adapter"]
    # Others may read what mkdir lets them read.
    plain = tmp_path / "plain"
    plain.mkdir()
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full"), SystemExit(1)]
)
@pytest.mark.parametrize("earlier", [True, False])
def test_what_fails_leaves_what_was_there(
    tmp_path: Path, failure: BaseException, earlier: bool
) -> None:
    path = tmp_path / "adapter"
    if earlier:
        fill(path, "old")
    with (
        pytest.raises(type(failure)),
        whole_folder(path, replace=True) as folder,
    ):
        (folder / "a").write_text("half of the new")
        raise failure
    assert content(tmp_path) == (
        {"adapter/a": "old", "adapter/inner/b": "old"} if earlier else {}
    )


@pytest.mark.parametrize("renames", [0, 1])
def test_a_rename_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    path = tmp_path / "adapter"
    fill(path, "old")
    rename, done = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        done.append(self)
        if len(done) == renames + 1:
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken disk"):
        fill(path, "new", replace=True)
    assert content(tmp_path) == {"adapter/a": "old", "adapter/inner/b": "old"}


def test_a_folder_that_is_not_empty_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.mkdir()
    fill(path, "old")  # an empty one is no loss
    with pytest.raises(FileExistsError, match="replace=True"):
        fill(path, "new")
    assert content(path) == {"a": "old", "inner/b": "old"}
    (path / "of the old one alone").write_text("old")
    fill(path, "new", replace=True)
    assert content(path) == {"a": "new", "inner/b": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.write_text("a file")
    with pytest.raises(NotADirectoryError, match="is a file"):
        fill(path, "new", replace=True)
    assert path.read_text() == "a file"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    fill(tmp_path / "target", "old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    fill(tmp_path / "link", "new", replace=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "target") == {"a": "new", "inner/b": "new"}


KILLED = """
import os, signal, sys
from pathlib import Path
from qlora_lib.finetuning import saving
rename, done = Path.rename, []
def killed(self, target):
    done.append(self)
    if len(done) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killed
with saving.whole_folder(sys.argv[1], replace=True) as folder:
    (folder / "a").write_text("new")
"""


@pytest.mark.parametrize("at_rename", [1, 2])
def test_a_killed_process_loses_nothing(tmp_path: Path, at_rename: int) -> None:
    path = tmp_path / "adapter"
    fill(path, "old")
    command = [sys.executable, "-c", KILLED, str(path), str(at_rename)]
    killed = subprocess.run(command, env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {p.name for p in tmp_path.iterdir()}
    # Between the renames the old folder lies beside, and the next save finds it there.
    assert left == {".adapter.partial", "adapter" if at_rename == 1 else ".adapter.old"}
    with pytest.raises(FileExistsError):
        fill(path, "newer")
    assert content(path) == {"a": "old", "inner/b": "old"}
    fill(path, "newer", replace=True)
    assert content(tmp_path) == {"adapter/a": "newer", "adapter/inner/b": "newer"}


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").touch()
    with (
        pytest.raises(ValueError, match="is the current folder or a mounted one"),
        whole_folder(".", replace=True) as folder,
    ):
        (folder / "new").touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
