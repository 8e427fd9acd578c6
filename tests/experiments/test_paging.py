"""The measurement of paging: it runs without a GPU, and its checks can fail."""

import gc
import json
import os
import sys
import time
from collections import Counter

import pytest
import torch

import paging
import paging_candidates
import paging_spike
import paging_targets
import paging_timing
import paging_trace
import paging_updates
from paging_candidates import FUSED, MANAGED, OFFLOADED, PAGED, Candidate
from qlora_lib import PagedAdamW


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    def run(*arguments):
        command = ["paging.py", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        paging.main()
        return json.loads((tmp_path / "paging.json").read_text())

    return run


def quick(section):
    found = [part for part in paging.quick_parts() if part.section == section]
    return [paging.measure(part, "cpu") for part in found]


def test_updates_are_checked_and_move_what_is_not_resident():
    groups = {group["group"]: group["candidates"] for group in quick("updates")}
    assert set(groups) == set(paging_updates.GROUPS)
    for candidates in groups.values():
        for entry in candidates:
            if entry["optimizer"] in (MANAGED, OFFLOADED):
                assert "needs a GPU" in entry["error"]
            else:
                assert entry["seconds"] >= entry["shortest_seconds"] > 0
            if entry["optimizer"] == PAGED:
                streamed = (1 - entry["resident_share"]) * entry["state_bytes"]
                assert entry["per_step"]["bytes_in"] == pytest.approx(streamed)
                assert entry["per_step"]["bytes_out"] == pytest.approx(streamed)
                assert entry.get("equal_bits", True) is True
    budgets = groups["budgets"]
    paged = [e for e in budgets if e.get("state_bits") == 32]
    shares = [entry["resident_share"] for entry in paged]
    for entry in paged:
        whole, page = entry["state_bytes"], paging.TINY_PAGE_BYTES
        budget = max(4 * page, entry["budget_share"] * whole)
        assert entry["budget_bytes"] == budget
        assert entry["resident_share"] * whole <= budget
    assert shares[0] == 0 and 0 < shares[2] < 1 and shares[3] == 1
    assert paging_targets.pick(budgets, optimizer=FUSED)["agrees"] is True
    # Of each kind of state all but the first are compared with it.
    assert sum("equal_bits" in entry for entry in budgets) == 3 + 1


def test_a_result_that_differs_is_seen():
    bench = paging_updates.Bench([(4, 512)], "cpu", backward=False)
    paged = Candidate(PAGED, 0.0)
    bench.add(paged, 2**15)
    same = [e.clone() for e in bench.expected[32]]
    assert bench.compare(paged, same) == {"equal_bits": True}
    assert bench.compare(Candidate(FUSED), same)["agrees"] is True
    same[0][1, 3] += 1e-6
    assert bench.compare(paged, same) == {"equal_bits": False}
    assert bench.compare(Candidate(FUSED), same)["agrees"] is False
    assert paging.errors({"candidates": [{"equal_bits": False}]})


def test_shapes_are_those_of_the_adapters():
    shapes = paging_candidates.adapter_shapes(*paging_candidates.LLAMA_7B, rank=64)
    assert len(shapes) == 448
    assert sum(n * k for n, k in shapes) == 159_907_840
    (training,) = quick("training")
    tiny = paging_candidates.adapter_shapes(*paging.TINY_SHAPE, training["rank"])
    assert training["parameters"] == sum(n * k for n, k in tiny)
    runs = training["runs"]
    assert Counter((r["accumulation"], r["optimizer"]) for r in runs) == Counter(
        {(1, PAGED): 2, (1, FUSED): 1, (2, PAGED): 2, (2, FUSED): 1}
    )
    assert not any("error" in run for run in runs)


def test_spike_ends_the_resident_run_only():
    (spike,) = quick("spike")
    assert spike["resident_ran_out_at_the_spike"] is True
    assert len(spike["resident"]["losses"]) == paging_spike.SPIKE
    assert spike["paged_completed"] is True and spike["equal_losses"] is True
    assert len(spike["paged"]["losses"]) == paging_spike.STEPS
    # Before the first step nothing is resident; the spike is attempted twice.
    at = paging_spike.SPIKE
    assert spike["paged"]["share_in_step"][1 : at + 2] == [1.0] * at + [0.0]
    after = spike["paged"]["share_after_step"]
    assert after[at] == 0 and after[-1] == 1
    assert spike["paged"]["counters"][-1]["evictions"] == 1
    assert spike["without_limit"]["counters"][-1]["evictions"] == 0


def test_spike_without_eviction_is_recorded_as_failed(monkeypatch):
    monkeypatch.setattr(PagedAdamW, "evict", lambda self: 0)
    (spike,) = quick("spike")
    assert spike["paged_completed"] is False and spike["equal_losses"] is False
    assert spike["paged"]["failed_at"] == paging_spike.SPIKE


def test_a_step_that_fails_costs_only_itself():
    calls = []

    def second_fails():
        assert not gc.isenabled()
        calls.append("second")
        if calls.count("second") == 4:
            raise torch.OutOfMemoryError("no memory\nand a long trace")

    steps = {"first": lambda: calls.append("first"), "second": second_fails}
    times = paging_timing.alternate(steps, "cpu", rounds=4, group_seconds=0.0)
    assert calls == ["first", "second", "second", "first"] * 2  # in turns
    assert times["second"] == {"error": "OutOfMemoryError: no memory"}
    assert times["first"]["steps_per_group"] == 1
    assert gc.isenabled()


def test_groups_of_steps_take_about_the_time_asked_for(monkeypatch):
    counts = []

    def time_group(step, device, count):
        counts.append(count)
        return {"seconds": 0.01 * len(counts)}

    times = paging_timing.time_group(lambda: time.sleep(0.003), "cpu", 2)
    assert times["seconds"] >= 0.003
    monkeypatch.setattr(paging_timing, "time_group", time_group)
    found = paging_timing.alternate({"step": None}, "cpu", 3, group_seconds=0.12)
    # The first run only compiles; the second says how long a step takes.
    assert counts == [1, 1, 6, 6, 6]
    expected = {"steps_per_group": 6, "seconds": 0.04, "shortest_seconds": 0.03}
    assert found["step"] == expected


def test_timeline_of_a_trace():
    def event(category, name, start, **arguments):
        named = {"cat": category, "name": name, "args": {"stream": 7, **arguments}}
        return {"ts": start, "dur": 2.0, **named}

    into, out = "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pinned)"
    events = [
        event("gpu_memcpy", into, 30.0, bytes=4096),
        event("gpu_memcpy", into, 10.0, bytes=4096),
        event("gpu_memcpy", into, 5.0, bytes=64),  # a table of the kernel
        event("gpu_memcpy", out, 20.0, bytes=4096),
        event("kernel", "adamw_kernel", 15.0),
        event("kernel", "vectorized_elementwise", 1.0),
        {"name": "process_name", "ph": "M"},
    ]
    found = paging_trace.intervals(events, 4096)
    starts = {what: [e["start_us"] for e in kind] for what, kind in found.items()}
    assert starts == {"in": [0.0, 20.0], "update": [5.0], "out": [10.0]}
    assert found["out"][0]["end_us"] == 12.0


def test_the_kernel_of_the_trace_is_the_one_that_runs():
    adamw = pytest.importorskip("qlora_lib.kernels.adamw")
    assert hasattr(adamw, paging_trace.UPDATE_KERNEL)


def test_ratios_and_their_targets():
    def times(seconds, **about):
        return {"seconds": seconds, "shortest_seconds": seconds / 2, **about}

    candidates = [
        times(1.2, optimizer=PAGED, budget_share=0.0, state_bits=32),
        times(0.9, optimizer=PAGED, budget_share=0.0, state_bits=8),
        times(0.104, optimizer=PAGED, budget_share=1.0, state_bits=32),
        times(0.1, optimizer=FUSED),
        times(1.0, optimizer=paging_candidates.COPIES),
    ]
    way = {"batch_size": 1, "sequence": 512}
    runs = [
        times(t, optimizer=o, budget_share=s, **way, accumulation=a)
        for a in (1, 16)
        for t, o, s in ((1.02, PAGED, 0.0), (1.0, PAGED, 1.0), (0.9, FUSED, None))
    ]
    sections = {
        "updates": [
            {"group": "budgets", "parameters": 7, "candidates": candidates},
            {"group": "managed", "error": "TimeoutError: no result after 300 s"},
        ],
        "training": [{"runs": runs}],
    }
    found = paging_targets.ratios(sections)
    assert [(r["of_medians"], r.get("met")) for r in found] == [
        (1.2, False),
        (1.04, True),
        (1.02, None),  # with one sequence a step it is reported only
        (1.1333, None),
        (1.02, True),
        (1.1333, False),
    ]
    assert found[0]["parameters"] == 7
    peers = [
        times(2.0, optimizer=OFFLOADED, state_bits=32),
        times(2.5, optimizer=PAGED, budget_share=0.5, state_bits=32),
    ]
    slower = {"group": "offloaded", "parameters": 7, "candidates": peers}
    (one,) = paging_targets.ratios({"updates": [slower]})
    assert (one["of_medians"], one["target"], one["met"]) == (0.8, "> 1", False)


def test_managed_memory_is_not_asked_for_beyond_what_is_free(monkeypatch):
    for free, enough in ((6, True), (5, False)):
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda free=free: (free * 2**30, 0)
        )
        if enough:
            paging_candidates.check_room(4 * 2**30)
        else:
            with pytest.raises(MemoryError, match="managed memory"):
                paging_candidates.check_room(4 * 2**30)


def test_sections_are_merged_into_a_record_of_the_same_commit(run_main, monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "abc")
    first = run_main("--quick", "--sections", "link")
    assert set(first["sections"]) == {"link"}
    second = run_main("--quick", "--sections", "trace")
    assert set(second["sections"]) == {"link", "trace"}
    assert second["sections"]["link"] == first["sections"]["link"]
    monkeypatch.setenv("GIT_COMMIT", "def")
    assert set(run_main("--quick", "--sections", "trace")["sections"]) == {"trace"}


def test_what_cannot_be_measured_is_refused(run_main, monkeypatch, capsys):
    for arguments, message in (
        ((), "need a GPU"),
        (("--quick", "--sections", "link,lunk"), "no section ['lunk']"),
        (("--quick", "--out", str(paging.RESULTS)), "name another folder"),
    ):
        with pytest.raises(SystemExit):
            run_main(*arguments)
        assert message in capsys.readouterr().err


def test_a_part_that_fails_leaves_an_error(run_main, monkeypatch):
    def fails(device, **arguments):
        raise RuntimeError("the driver is gone\nand its trace")

    monkeypatch.setattr("paging_link.measure", fails)
    record = run_main("--quick", "--sections", "link,trace")
    assert record["sections"]["link"][0]["error"] == "RuntimeError: the driver is gone"
    assert "error" not in record["sections"]["trace"][0]


def test_a_process_that_dies_or_hangs_is_an_error(monkeypatch):
    with pytest.raises(RuntimeError, match="exit code 3"):
        paging.in_a_process(os._exit, 3)
    assert paging.in_a_process(divmod, 1, 0)["error"].startswith("ZeroDivisionError")
    monkeypatch.setattr(paging, "LIMIT_SECONDS", 0.5)
    with pytest.raises(TimeoutError):
        paging.in_a_process(time.sleep, 60)


def test_every_section_has_a_tiny_form():
    full, tiny = (
        {p.section for p in f()} for f in (paging.full_parts, paging.quick_parts)
    )
    assert full == tiny == {"link", "updates", "training", "spike", "trace"}
    ranks = {p.arguments["rank"] for p in paging.full_parts() if p.section == "updates"}
    assert ranks == {64, 320}
