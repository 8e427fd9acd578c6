"""What every recorded result says of itself: where, with what, and when it was made."""

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "experiments" / "results"


def provenance(packages: tuple[str, ...]) -> dict[str, Any]:
    """Date, commit, hardware, and the versions of Python and of the packages."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **versions},
    }


def write_record(name: str, record: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write a record to FOLDER/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def commit() -> str | None:
    """Short hash of the checked-out commit, or None before the first one.

    It ends with "-dirty" if tracked files differ from that commit. Where the files are
    a copy without their history, GIT_COMMIT in the environment names the commit.
    """
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    return answer.stdout.strip() if answer.returncode == 0 else None


def hardware() -> str:
    """Name of the GPU if there is one, else of the processor with its thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():  # Linux leaves platform.processor() empty
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line for line in lines if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"CPU, {name}, {torch.get_num_threads()} threads"
