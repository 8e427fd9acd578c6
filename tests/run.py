"""Run every check, each to its end, and close with one summary."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

STEPS = {
    "style": [BIN / "ruff", "check", "."],
    "format": [BIN / "ruff", "format", "--check", "."],
    "types": [BIN / "mypy"],
    "imports": [BIN / "lint-imports"],
    "chapters": [sys.executable, "book/chapters.py", "test"],
    "tests": [sys.executable, "-m", "pytest"],
}


def main() -> int:
    """Run the steps; 0 if all of them passed."""
    summary = []
    for name, command in STEPS.items():
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        passed = subprocess.run(command, cwd=ROOT, check=False).returncode == 0
        summary.append((name, passed, time.perf_counter() - start))

    print("\n== summary")
    for name, passed, seconds in summary:
        print(f"{name:10}{'passed' if passed else 'FAILED':8}{seconds:7.1f} s")
    total = sum(seconds for _, _, seconds in summary)
    failed = [name for name, passed, _ in summary if not passed]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all passed"
    print(f"{verdict} in {total:.1f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
