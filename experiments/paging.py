"""Measure PagedAdamW beside resident, managed and offloaded optimizers.

    python experiments/paging.py                          # on a GPU
    python experiments/paging.py --sections link,updates  # only these
    python experiments/paging.py --quick                  # tiny sizes, on a CPU too

Sections: the link between host and card; the update alone at every budget; the whole
training step of a 7B shape; a forced spike of memory; the timeline of a step. Each part
has a process of its own, since some memory is given back with its process only. Writes
experiments/results/paging.json, anew after each part, so that one that fails costs only
itself. Sections that are not run stay as they are in a record of the same commit.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from paging_targets import ratios
from paging_timing import one_line
from paging_updates import GROUPS
from record import RESULTS, commit, provenance, write_record

PACKAGES = "torch triton transformers peft bitsandbytes torchao".split()
LIMIT_SECONDS = 600  # of one part
JOIN_SECONDS = 20  # to end after it
TINY_SHAPE = (2, 64, 160)
TINY_PAGE_BYTES = 32 * 1024


@dataclass(frozen=True)
class Part:
    """What one process measures: ``paging_SECTION.measure`` and its arguments."""

    section: str
    arguments: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, any device")
    parser.add_argument("--sections", default=None, help="some, with commas between")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out == RESULTS:
        parser.error("--quick measures nothing of worth: name another folder by --out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not arguments.quick and device == "cpu":
        parser.error("these sizes need a GPU: try --quick")
    parts = quick_parts() if arguments.quick else full_parts()
    known = list(dict.fromkeys(part.section for part in parts))
    chosen = arguments.sections.split(",") if arguments.sections else known
    if unknown := set(chosen) - set(known):
        parser.error(f"no section {sorted(unknown)}: choose from {', '.join(known)}")
    record = (called_here if device == "cpu" else in_a_process)(about)
    record["quick"] = arguments.quick
    record["sections"] = earlier_sections(arguments.out, record)
    for section in chosen:
        record["sections"][section] = results = []
        for part in (part for part in parts if part.section == section):
            began = time.perf_counter()
            result = attempt(part, device)
            result["part_seconds"] = round(time.perf_counter() - began, 1)
            results.append(result)
            # Of tiny sizes they would say nothing.
            found = [] if arguments.quick else ratios(record["sections"])
            record["ratios"] = found
            write_record("paging", record, arguments.out)
            print(section, part.arguments, f"{result['part_seconds']} s", flush=True)
            for error in errors(result):
                print(f"  {error}", flush=True)
    for ratio in record["ratios"]:
        print(ratio)


def full_parts() -> list[Part]:
    """The shapes of adapters of LLaMA 7B: 160 million numbers, and 800 million."""
    updates = [
        Part("updates", {"group": group, "rank": rank})
        for rank in (64, 320)
        for group in GROUPS
    ]
    # Bytes of the state of both.
    link = Part("link", {"sizes": [1_280_000_000, 6_400_000_000]})
    # Steps of one sequence, and of the paper's batch of 16. With up to 2048 tokens at a
    # time the GPU waits for the host most of its time, and a step is as noisy as the
    # host is; with more the host waits for the GPU.
    short = ((1, 1, 512, 8, 1.5), (1, 16, 512, 8, 0.0))
    long = (
        (1, 1, 2048, 6, 1.5),
        (4, 4, 2048, 6, 0.0),
        (1, 1, 6144, 2, 1.5),
        (1, 16, 6144, 3, 0.0),
    )
    training = [Part("training", {"ways": ways}) for ways in (short, long)]
    return [link, *updates, *training, Part("spike"), Part("trace")]


def quick_parts() -> list[Part]:
    tiny = {"page_bytes": TINY_PAGE_BYTES}
    updates = {
        "group_seconds": 0.01,
        "rank": 8,
        "shape": TINY_SHAPE,
        "rounds": 1,
        **tiny,
    }
    ways = ((1, 1, 16, 2, 0.01), (1, 2, 16, 2, 0.0))
    spike = {"width": 64, "layers": 2, "lengths": (16, 1024), **tiny}
    return [
        Part("link", {"sizes": [2**16]}),
        *(Part("updates", {"group": group, **updates}) for group in GROUPS),
        Part("training", {"shape": TINY_SHAPE, "ways": ways, **tiny}),
        Part("spike", spike),
        Part("trace", {"rank": 8, "shape": TINY_SHAPE, **tiny}),
    ]


def about() -> dict[str, Any]:
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    return provenance(tuple(installed))


def attempt(part: Part, device: str) -> dict[str, Any]:
    """What a part measures, or its error: memory that runs out, a process that dies."""
    try:
        call = called_here if device == "cpu" else in_a_process
        return {**part.arguments, **call(measure, part, device)}
    except Exception as error:
        return {**part.arguments, "error": one_line(error)}


def measure(part: Part, device: str) -> dict[str, Any]:
    module = importlib.import_module(f"paging_{part.section}")
    return module.measure(device, **part.arguments)


def called_here(function: Any, *arguments: Any) -> dict[str, Any]:
    return function(*arguments)


def in_a_process(function: Any, *arguments: Any) -> dict[str, Any]:
    """What a function returns in a process of its own, which is ended after a while.

    It is started, not forked: CUDA cannot be shared with a fork.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(LIMIT_SECONDS):
            raise TimeoutError(f"no result after {LIMIT_SECONDS} s")
        result = receiver.recv()
        process.join(JOIN_SECONDS)
    except EOFError:
        process.join(JOIN_SECONDS)
        message = f"the process ended with exit code {process.exitcode}"
        raise RuntimeError(message) from None
    finally:
        process.kill()
        process.join()
    return result


def answer(sender: Connection, function: Any, arguments: tuple[Any, ...]) -> None:
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send({"error": one_line(error)})


def earlier_sections(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The sections of a record that was made with the same code and hardware."""
    path = folder / "paging.json"
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    origin = ("commit", "hardware", "versions", "quick")
    same = all(earlier[key] == record[key] for key in origin)
    return earlier["sections"] if same and commit() is not None else {}


def errors(value: Any, place: str = "") -> list[str]:
    """Every error and every failed check in a result, with its place."""
    if isinstance(value, list):
        return [e for i, item in enumerate(value) for e in errors(item, f"{place}/{i}")]
    if not isinstance(value, dict):
        return []
    found = []
    if "error" in value:
        found.append(f"{place} {value.get('optimizer', '')}: {value['error']}")
    # Ratios are not in the sections, so what is false there is a check that failed.
    found += [f"{place}/{key}: False" for key, item in value.items() if item is False]
    for key, item in value.items():
        found += errors(item, f"{place}/{key}")
    return found


if __name__ == "__main__":
    main()
