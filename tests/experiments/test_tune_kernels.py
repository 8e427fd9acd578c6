"""The candidates of experiments/tune_kernels.py: each is right, and leaves no trace."""

import pytest
import torch

import tune_kernels
from qlora_lib.kernels.dispatch import dequantize

N, K = 80, 256


@pytest.fixture(autouse=True)
def where_kernels_run(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(tune_kernels, "DEVICE", "cpu")


def test_every_candidate_multiplies():
    torch.manual_seed(0)
    storage = tune_kernels.random_storage(N, K)
    weight = dequantize(storage, N * K, torch.float64).view(N, K)
    kernels = set()
    for candidate in tune_kernels.candidates(3):
        if candidate.kernel == "dense":
            continue
        kernels.add(candidate.kernel)
        rows = tune_kernels.random_rows(3, N if candidate.is_gradient else K)
        found = candidate(rows, storage, N, K).double()
        expected = rows.double() @ (weight if candidate.is_gradient else weight.T)
        error = (found - expected).norm() / expected.norm()
        assert error < tune_kernels.TOLERANCE, candidate
    assert kernels == {
        "dequantize",
        "few rows",
        "many rows",
        "gradient: dequantize",
        "gradient: kernel",
    }


def test_constants_are_put_back():
    few = tune_kernels.few
    before = few.TILINGS
    storage = tune_kernels.random_storage(N, K)
    for candidate in tune_kernels.candidates(1):
        if candidate.kernel == "few rows":
            candidate(tune_kernels.random_rows(1, K), storage, N, K)
            break
    assert few.TILINGS is before


@pytest.mark.parametrize("m", tune_kernels.TOKENS)
def test_each_number_of_rows_has_candidates_of_its_own(m):
    kernels = {candidate.kernel for candidate in tune_kernels.candidates(m)}
    assert {"dense", "dequantize", "gradient: dequantize"} <= kernels
    assert ("few rows" in kernels) == (m <= tune_kernels.few.MAX_ROWS)
    assert ("many rows" in kernels) == (m <= 1024)
