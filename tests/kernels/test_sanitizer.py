"""No kernel reads or writes beyond its tensors, and no threads race."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("sanitized.py")
SANITIZER = shutil.which("compute-sanitizer")


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on the PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    # Allocations of PyTorch's cache would stand side by side in one that is allowed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable]
    answer = subprocess.run(
        [*command, SCRIPT], env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-4000:]
    assert "every kernel ran" in answer.stdout
    assert "0 errors" in answer.stdout or "0 hazards" in answer.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sanitizer runs it")
def test_the_script_in_the_interpreter():
    answer = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-4000:]
    assert answer.stdout == "every kernel ran\n"
