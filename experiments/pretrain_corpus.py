"""The corpus of the base model: Python source that every reader has installed.

Training text is the standard library, without the modules that
`qlora_lib.finetuning.docstrings` holds out, and the packages of `PACKAGES` that are
installed. Validation text is those modules and one whole package.
"""

import importlib.metadata
import importlib.util
import platform
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_lib.finetuning.docstrings import is_held_out, standard_library_files

PACKAGES = (
    "numpy scipy pandas sklearn statsmodels matplotlib sympy mpmath torch transformers "
    "peft accelerate IPython sphinx docutils jinja2 hypothesis"
).split()
STANDARD_LIBRARY, HELD_OUT_PACKAGE = "standard library", "networkx"
SKIPPED_DIRECTORIES = frozenset(
    "test tests testing _vendor _vendored vendor vendored extern externals third_party "
    "polyfills __pycache__".split()
)
MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True)
class Corpus:
    """Texts to train on, texts to validate on by name, and where they come from."""

    train: list[str]
    held_out: dict[str, list[str]]
    sources: list[dict[str, str | int]]
    held_out_sources: list[dict[str, str | int]]
    dropped_files: int


def installed_corpus(max_package_bytes: int | None = None) -> Corpus:
    """Read the standard library and the packages of `PACKAGES` that are installed.

    Args:
        max_package_bytes: Where given, the most that one package contributes.
    """
    held_out = held_out_texts()
    known = {run for texts in held_out.values() for text in texts for run in runs(text)}
    modules = standard_library_files()
    groups = {
        STANDARD_LIBRARY: read_files(p for name, p in modules if not is_held_out(name))
    }
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            groups[package] = read_files(package_files(package), max_package_bytes)
    clean = {
        name: [text for text in texts if known.isdisjoint(runs(text))]
        for name, texts in groups.items()
    }
    train = [text for texts in clean.values() for text in texts]
    return Corpus(
        train=train,
        held_out=held_out,
        sources=[describe(name, texts) for name, texts in clean.items()],
        held_out_sources=[describe(name, texts) for name, texts in held_out.items()],
        dropped_files=sum(map(len, groups.values())) - len(train),
    )


def held_out_texts() -> dict[str, list[str]]:
    """Read the held-out modules of the standard library and the held-out package."""
    modules = standard_library_files()
    return {
        STANDARD_LIBRARY: read_files(p for name, p in modules if is_held_out(name)),
        HELD_OUT_PACKAGE: read_files(package_files(HELD_OUT_PACKAGE)),
    }


def package_files(package: str) -> list[Path]:
    """List a package's own source files in a fixed, shuffled order."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package={package!r} is not installed: install it")
    root = Path(spec.submodule_search_locations[0])
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    own = [path for path in files if SKIPPED_DIRECTORIES.isdisjoint(path.parts)]
    own.sort(key=lambda path: (zlib.crc32(path.as_posix().encode()), path))
    return [root / path for path in own]


def read_files(paths: Iterable[Path], max_bytes: int | None = None) -> list[str]:
    """Read source files once each, without tables, until `max_bytes` are reached."""
    texts: dict[str, None] = {}
    total = 0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore").strip() + "\n"
        size = len(text.encode())
        letters = sum(character.isalpha() for character in text)
        # Fewer than two letters in five: a table of numbers in Python's clothes.
        if size > MAX_FILE_BYTES or letters < 0.4 * len(text) or text in texts:
            continue
        if max_bytes is not None and total + size > max_bytes:
            break
        texts[text] = None
        total += size
    return list(texts)


def runs(text: str, lines: int = 8) -> Iterator[int]:
    """Hash every run of `lines` consecutive non-blank lines, without indentation.

    A training file that shares one such run with a held-out file is dropped.
    """
    kept = [stripped for line in text.splitlines() if (stripped := line.strip())]
    for start in range(len(kept) - lines + 1):
        yield hash("\n".join(kept[start : start + lines]))


def describe(name: str, texts: Iterable[str]) -> dict[str, str | int]:
    """Name, version and license of a package by its own metadata, and bytes read."""
    size = sum(len(text.encode()) for text in texts)
    if name == STANDARD_LIBRARY:
        version = platform.python_version()
        return {"name": name, "version": version, "license": "PSF-2.0", "bytes": size}
    distribution = importlib.metadata.packages_distributions()[name][0]
    metadata = importlib.metadata.metadata(distribution)
    license_name = metadata.get("License-Expression") or next(
        (
            classifier.rpartition(" :: ")[2]
            for classifier in metadata.get_all("Classifier", [])
            if classifier.startswith("License :: OSI Approved :: ")
        ),
        metadata.get("License", "see the package").partition("\n")[0],
    )
    return {
        "name": distribution,
        "version": metadata["Version"],
        "license": license_name,
        "bytes": size,
    }
