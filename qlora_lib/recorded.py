"""Results that were recorded on another machine than the reader's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def recorded_result(name: str, folder: Path | str) -> dict[str, Any] | None:
    """Read a result that a script of ``experiments/`` has recorded.

    Args:
        name: Name of the experiment, such as ``"pretrain"``.
        folder: Where the results are.

    Returns:
        The content of ``folder/name.json``, or None if the experiment was not run yet.

    Raises:
        ValueError: If the file holds something else than a JSON object.
    """
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"name={name!r}: {path.name} is no JSON ({error}); run the experiment again"
        ) from error
    if not isinstance(result, dict):
        raise ValueError(
            f"name={name!r}: {path.name} holds a {type(result).__name__}, not an "
            "object; run the experiment again"
        )
    return result


def provenance_line(result: dict[str, Any] | None) -> str:
    """Say where and when a result was made, or that it was not made yet."""
    if result is None:
        return "Not yet measured on a GPU."
    versions = result["versions"]
    return (
        f"Measured on {result['hardware']} with torch {versions['torch']}, "
        f"{result['date']}."
    )
