"""The timeline of a step: copies in, updates and copies out, as the GPU ran them."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from paging_candidates import LLAMA_7B, adapter_shapes, make_paged, make_parameters
from qlora_lib.optim.adamw import PAGE_BYTES

PAGES = 24  # as many as a figure can show
WARM_UP_STEPS = 3
UPDATE_KERNEL = "adamw_kernel"


def measure(
    device: str,
    rank: int = 64,
    shape: tuple[int, int, int] = LLAMA_7B,
    budget_share: float = 0.0,
    page_bytes: int = PAGE_BYTES,
) -> dict[str, Any]:
    """Record a step with nothing resident, after a few that are not recorded."""
    trained = make_parameters(adapter_shapes(*shape, rank), device)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer = make_paged(trained, budget_share, page_bytes)
    for _ in range(WARM_UP_STEPS):
        optimizer.step()
    on_card = device == "cuda"
    kind = ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU
    if on_card:
        torch.cuda.synchronize()
    with profile(activities=[kind]) as recorded:
        optimizer.step()
        if on_card:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    found = intervals(events, optimizer.minimum_budget)
    if on_card and not all(found[what] for what in ("in", "update", "out")):
        names = sorted({e["name"] for e in events if e.get("cat") == "kernel"})
        raise RuntimeError(f"the trace lacks copies or updates; kernels: {names}")
    return {
        "parameters": sum(p.numel() for p in trained),
        "page_bytes": optimizer.minimum_budget,
        "pages": optimizer.state_bytes // optimizer.minimum_budget,
        "resident_share": optimizer.resident_share,
        "intervals": [entry for what in found.values() for entry in what[:PAGES]],
    }


def intervals(
    events: list[dict[str, Any]], page_bytes: int
) -> dict[str, list[dict[str, Any]]]:
    """What moves or updates a page in a Chrome trace, by kind, in order of time.

    Times are microseconds since the first of them.
    """
    found: dict[str, list[dict[str, Any]]] = {"in": [], "update": [], "out": []}
    for event in events:
        if (what := kind_of(event, page_bytes)) is not None:
            entry = {"what": what, "stream": event["args"]["stream"]}
            entry |= {"start_us": event["ts"], "end_us": event["ts"] + event["dur"]}
            found[what].append(entry)
    entries = [entry for kind in found.values() for entry in kind]
    first = min((entry["start_us"] for entry in entries), default=0)
    for entry in entries:
        entry["start_us"] = round(entry["start_us"] - first, 2)
        entry["end_us"] = round(entry["end_us"] - first, 2)
    return {
        what: sorted(kind, key=lambda entry: entry["start_us"])
        for what, kind in found.items()
    }


def kind_of(event: dict[str, Any], page_bytes: int) -> str | None:
    category, name = event.get("cat"), event.get("name", "")
    # Smaller copies are of what the kernel looks up.
    if category == "gpu_memcpy" and event["args"]["bytes"] == page_bytes:
        return {"HtoD": "in", "DtoH": "out"}.get(name.removeprefix("Memcpy ")[:4])
    if category == "kernel" and UPDATE_KERNEL in name:
        return "update"
    return None
