import json
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_lib
from qlora_lib.cli import memory as memory_module

COMMANDS = ["memory", "quantize", "finetune", "generate", "merge"]


def test_help_imports_no_transformers():
    code = (
        "import sys; from qlora_lib.cli import app\n"
        "try: app(['finetune', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'transformers', 'peft', 'datasets'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_entry_point_shows_the_version():
    command = Path(sys.executable).with_name("qlora")
    answer = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert answer.returncode == 0
    assert answer.stdout == f"qlora {qlora_lib.__version__}\n"


def test_help_lists_the_commands_and_the_exit_codes(qlora):
    result = qlora("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout
    for code in ("0 done", "1 failed", "2 wrong use", "3 the run", "130 interrupted"):
        assert code in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example_that_its_options_allow(qlora, command):
    shown = qlora(command, "--help").stdout
    (example,) = [line for line in shown.splitlines() if "Example: qlora" in line]
    words = example.split()
    assert words[1:3] == ["qlora", command]
    for word in words:
        if word.startswith("--"):
            assert shown.count(word) >= 2, f"{word} is no option of {command}"


def test_wrong_use_ends_with_2(failing):
    assert "No such option" in failing("memory", "llama-7b", "--gpus", "3", code=2)
    assert "Missing argument" in failing("merge", "somewhere", code=2)
    assert "No such command" in failing("fine-tune", code=2)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_codebook_is_refused_with_the_known_ones(failing, command):
    count = {"quantize": 2, "finetune": 3, "merge": 3}.get(command, 1)
    words = ["somewhere"] * count
    message = failing(command, *words, "--codebook", "nf44", code=2)
    assert "got 'nf44'" in message and "nf4," in message


def test_a_device_that_is_not_there_is_refused(failing):
    message = failing("generate", "m", "--device", "cuda:99", code=2)
    assert "--device cpu" in message
    assert "no device" in failing("generate", "m", "--device", "gpu", code=2)


def test_a_defect_is_one_line_that_says_how_to_report_it(monkeypatch, qlora, failing):
    def broken(*args):
        raise AttributeError("no attribute\n'x'")

    monkeypatch.setattr(memory_module, "_estimate", broken)
    message = failing("memory", "llama-7b")
    assert message.startswith("AttributeError: no attribute 'x'. This is a defect")
    assert "qlora --traceback" in message
    with_traceback = qlora("--traceback", "memory", "llama-7b")
    assert isinstance(with_traceback.exception, AttributeError)


def test_a_user_is_spared_warnings_for_developers(monkeypatch, qlora):
    code = (
        "import sys, warnings\n"
        "from qlora_lib.cli.output import working\n"
        "with working():\n"
        "    print('progress')\n"
        "    warnings.warn('for users', stacklevel=2)\n"
        "    warnings.warn('for developers', FutureWarning, stacklevel=2)\n"
        "print('result')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "result\n"
    assert answer.stderr.splitlines() == ["progress", "warning: for users"]


def test_json_has_no_nan(capsys):
    from qlora_lib.cli.output import show_result

    show_result({"losses": [1.0, float("nan")], "a": {"b": float("inf")}}, True)
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"losses": [1.0, None], "a": {"b": None}}


def test_what_a_model_says_is_shown_as_it_is(capsys):
    from qlora_lib.cli.output import say, show_result

    text = "x[0]\t[bold]:smile: " + "long " * 50
    show_result({}, False, text)
    say(text)
    assert capsys.readouterr() == (text + "\n", text + "\n")
