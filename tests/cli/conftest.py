"""The command, called in this process, and what it is called on."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from typer.testing import CliRunner, Result

from chapters import ROOT
from qlora_lib.cli import app

# Help texts are as wide as the terminal, and colored where a service asks for it.
ENVIRONMENT = {"COLUMNS": "200", "NO_COLOR": "1", "GITHUB_ACTIONS": None}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Read when they were imported, perhaps by another test.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def qlora() -> Callable[..., Result]:
    """Run the command with these words."""

    def run(*words: str | Path, input: str | None = None) -> Result:
        return CliRunner(env=ENVIRONMENT).invoke(
            app, [str(word) for word in words], input=input, prog_name="qlora"
        )

    return run


@pytest.fixture(scope="session")
def base() -> str:
    return str(ROOT / "models" / "base")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """A small jsonl file."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"f({n}) =" + " 1 +" * n, "answer": f" {n}."} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def short_run() -> list[str]:
    """Options of a run that takes a second."""
    return "--steps 4 --save-every 2 --batch-size 2 --rank 4 --device cpu".split()


@pytest.fixture(scope="session")
def adapter(qlora, base, pairs, short_run, tmp_path_factory) -> Path:
    """An adapter that the command has trained, with a rate that shows."""
    out = tmp_path_factory.mktemp("trained") / "adapter"
    result = qlora(
        *("finetune", base, pairs, out, *short_run, "--learning-rate", "0.02")
    )
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def failing(qlora) -> Callable[..., str]:
    """Run the command, which has to fail, both ways; return the message."""

    def fail(*words: str | Path, code: int = 1, **details: object) -> str:
        for_people, for_programs = qlora(*words), qlora(*words, "--json")
        assert for_people.exit_code == for_programs.exit_code == code
        assert for_people.stdout == ""
        answer = json.loads(for_programs.stdout)
        message: str = answer["error"]["message"]
        assert answer["error"]["exit_code"] == code
        last_line = for_people.stderr.splitlines()[-1]
        if code != 2:  # typer puts those in a box
            assert last_line == f"error: {message}"
        assert "Traceback" not in for_people.output + for_programs.output
        assert "\x1b" not in for_people.output
        return message

    return fail
