"""What PagedAdamW is meant to reach, as ratios of times of one process, met or not."""

from collections.abc import Iterator
from typing import Any

from paging_candidates import COPIES, FUSED, MANAGED, OFFLOADED, PAGED

PEERS = (COPIES, FUSED, MANAGED, OFFLOADED)
Entry = dict[str, Any]


def ratios(sections: dict[str, list[Entry]]) -> list[Entry]:
    """Every ratio that the sections have the times for."""
    found = []
    for group in sections.get("updates", []):
        for what, above, below, key, target in of_updates(group):
            about = {"what": what, "parameters": group.get("parameters")}
            found.append(about | ratio(above, below, key, target))
    for training in sections.get("training", []):
        for what, about, above, below, target in of_training(training):
            found.append({"what": what, **about, **ratio(above, below, target=target)})
    return [entry for entry in found if "of_medians" in entry]


def of_updates(group: Entry) -> Iterator[tuple[str, Entry, Entry, str, str]]:
    """What is compared in a group: above the line, below it, by which time."""
    candidates = group.get("candidates", [])

    def paged(share: float) -> Entry:
        return pick(candidates, optimizer=PAGED, budget_share=share, state_bits=32)

    other = {name: pick(candidates, optimizer=name) for name in PEERS}
    if group.get("group") == "budgets":
        yield "budget 0 over bare copies", paged(0), other[COPIES], "seconds", "<= 1.15"
        # With the host's part, and of the GPU alone.
        for key in ("seconds", "busy_seconds"):
            yield "budget 100 % over fused", paged(1), other[FUSED], key, "<= 1.05"
    if group.get("group") == "managed":
        what = "bitsandbytes, resident, over budget 100 %"
        yield what, other[MANAGED], paged(1), "seconds", "> 1"
    if group.get("group") == "offloaded":
        for share in (0, 0.25, 0.5):
            what = f"torchao over budget {share:.0%}, with a backward pass"
            yield what, other[OFFLOADED], paged(share), "seconds", "> 1"


def of_training(training: Entry) -> Iterator[tuple[str, Entry, Entry, Entry, str]]:
    runs = training.get("runs", [])
    names = "batch_size", "accumulation", "sequence"
    for way in dict.fromkeys(tuple(run[name] for name in names) for run in runs):
        about = dict(zip(names, way, strict=True))
        streamed = pick(runs, optimizer=PAGED, budget_share=0, **about)
        resident = pick(runs, optimizer=PAGED, budget_share=1, **about)
        fused = pick(runs, optimizer=FUSED, **about)
        # With one sequence it is reported only.
        target = "<= 1.03" if about["accumulation"] > 1 else ""
        yield "step, budget 0 over 100 %", about, streamed, resident, target
        yield "step, budget 0 over fused", about, streamed, fused, target


def pick(entries: list[Entry], **wanted: Any) -> Entry:
    """The entry with these values, or an empty one."""
    for entry in entries:
        if all(entry.get(key) == value for key, value in wanted.items()):
            return entry
    return {}


def ratio(above: Entry, below: Entry, key: str = "seconds", target: str = "") -> Entry:
    """Ratio of medians and of minima, and whether the former meets the target."""
    if key not in above or key not in below:
        return {}
    shortest = f"shortest_{key}"
    of_medians = above[key] / below[key]
    entry: Entry = {
        "by": key,
        "of_medians": round(of_medians, 4),
        "of_minima": round(above[shortest] / below[shortest], 4),
    }
    if target:
        sign, bound = target.split()
        met = of_medians <= float(bound) if sign == "<=" else of_medians > float(bound)
        entry |= {"target": target, "met": met}
    return entry
