"""Folders that are written whole or not at all.

A save may end early: Ctrl-C, a full disk, a machine that is switched off. What was
there before must survive that, and what is half written must not pass for whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a folder under a temporary name and give it its own when it is whole.

        with whole_folder("adapter") as folder:
            model.save_pretrained(folder)

    The files are written to ``.NAME.partial`` beside it. When the block ends, they are
    flushed to the disk and the folder is renamed, which is atomic. When the block
    raises, the partial folder is removed and ``path`` is as before. A partial folder
    that a killed process left is removed by the next save to the same path.

    To replace a folder takes two renames, old away and new in, because no portable call
    exchanges two folders. A process that is killed between both leaves the old one
    whole as ``.NAME.old``, and the next save puts it back before it begins.

    Args:
        path: The folder to write. Its parents are created.
        replace: Whether a folder that is there, and not empty, may be replaced, with
            all that is in it.

    Yields:
        The folder to write to.

    Raises:
        NotADirectoryError: If ``path`` is a file.
        FileExistsError: If ``path`` is a folder that is not empty, and ``replace`` is
            False.
        ValueError: If ``path`` is the current folder or a mount point, which a rename
            cannot replace.
    """
    path = Path(path).resolve()  # replace what a link points to, not the link
    partial, old = (path.with_name(f".{path.name}.{s}") for s in ("partial", "old"))
    if path == Path.cwd() or os.path.ismount(path):
        raise ValueError(
            f"path={str(path)!r} is the current folder or a mounted one, which cannot "
            "be replaced: name a folder in it"
        )
    _recover(path, old)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"path={str(path)!r} is a file: name a folder")
    if not replace and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(
            f"path={str(path)!r} is a folder that is not empty: name another, or pass "
            "replace=True to lose what is in it"
        )
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            _flush(entry)
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        _recover(path, old)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _recover(path: Path, old: Path) -> None:
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old)
    else:
        old.rename(path)


def _flush(path: Path) -> None:
    # A rename may reach the disk before the data does, unless these are flushed first.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
