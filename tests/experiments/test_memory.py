"""The measurement of memory: it runs without a GPU, and a failure costs one run."""

import json
import sys

import pytest

import memory


@pytest.fixture
def quick(monkeypatch, tmp_path):
    def run():
        monkeypatch.setattr(
            sys, "argv", ["memory.py", "--quick", "--out", str(tmp_path)]
        )
        memory.main()
        return json.loads((tmp_path / "memory.json").read_text())

    return run


def test_quick_run_estimates_and_trains(quick):
    record = quick()
    assert {"date", "hardware", "versions", "context_bytes"} <= set(record)
    with_checkpoints, without = record["runs"]
    for run in (with_checkpoints, without):
        assert "error" not in run
        first, *_, last = run["losses"]
        assert last < first
        parts = run["estimate"]["phases"][run["estimate"]["peak_phase"]]
        assert sum(parts.values()) == run["estimate"]["peak"]
    # The same numbers are computed, and other bytes are kept.
    assert with_checkpoints["losses"] == pytest.approx(without["losses"], rel=1e-3)
    assert with_checkpoints["estimate"]["peak"] < without["estimate"]["peak"]


def test_a_failure_is_recorded_and_the_next_run_made(quick, monkeypatch):
    original, calls = memory.random_llama, []

    def fails_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("out of memory\nand a trace of the driver")
        return original(*arguments)

    monkeypatch.setattr(memory, "random_llama", fails_once)
    failed, made = quick()["runs"]
    assert failed["error"] == "RuntimeError: out of memory"
    assert "losses" not in failed
    assert made["losses"]


def test_paged_state_is_not_asked_for_beyond_what_is_free(monkeypatch):
    estimate = {"peak": 30 * 2**30, "paged_state": 6 * 2**30}
    monkeypatch.setattr(memory.torch.cuda, "memory_allocated", lambda: 20 * 2**30)
    for free, enough in ((17, False), (18, True)):
        monkeypatch.setattr(
            memory.torch.cuda, "mem_get_info", lambda free=free: (free * 2**30, 0)
        )
        if enough:
            memory.check_room(estimate, "cuda")
        else:
            with pytest.raises(MemoryError, match="paged state needs"):
                memory.check_room(estimate, "cuda")


def test_the_shapes_of_the_paper_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    with pytest.raises(SystemExit):
        memory.main()
    assert "need a GPU" in capsys.readouterr().err


def test_all_sizes_are_measured_and_the_largest_is_paged():
    runs = memory.paper_runs()
    assert {run.model for run in runs if run.sequence_length == 512} == {
        f"llama-{size}" for size in ("7b", "13b", "33b", "65b")
    }
    assert any(r.model == "llama-7b" and r.sequence_length == 2048 for r in runs)
    largest = {run.optimizer for run in runs if run.model == "llama-65b"}
    assert largest == {memory.OURS, memory.PAGED, memory.PAGED_8BIT}
