"""The model card of the base model, written from the record of its run."""

from typing import Any


def model_card(record: dict[str, Any]) -> str:
    """Write the model card; every number in it comes from the record."""
    shape, held_out = record["configuration"], record["held_out"]
    on_cpu = record["hardware"].startswith("CPU")
    reason = (
        "It is the small size, trained on a CPU since no accelerator was at hand; "
        "`python experiments/pretrain.py --size full` trains the larger one.\n"
        if record["size"] == "small" and on_cpu
        else ""
    )
    rows = {
        "parameters": f"{record['parameters']:,}",
        "layers, hidden size": f"{shape['layers']}, {shape['hidden']}",
        "attention heads, key-value heads": f"{shape['heads']}, {shape['kv_heads']}",
        "vocabulary": f"{shape['vocabulary']:,} byte-level BPE tokens",
        "corpus": f"{record['corpus_tokens']:,} tokens",
        "tokens seen": f"{record['tokens_seen']:,} in {record['steps']:,} steps",
        "window": f"{shape['sequence_length']} tokens",
        "peak learning rate": shape["learning_rate"],
        "duration": f"{record['seconds'] / 60:.0f} minutes",
        "hardware": record["hardware"],
        "versions": ", ".join(f"{k} {v}" for k, v in record["versions"].items()),
        "commit": record["commit"] or "before the first commit",
        "date": record["date"],
    }
    points = [{**p, "tokens": f"{p['tokens']:,}"} for p in record["curve"]]
    losses = [
        {
            "held-out text": name,
            "nats per token": f"{loss['nats_per_token']:.4f}",
            "bits per byte": f"{loss['bits_per_byte']:.4f}",
        }
        for name, loss in held_out.items()
    ]
    samples = "\n".join(f"```python\n{s['text']}\n```\n" for s in record["samples"])
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# The base model of the book

A Llama of {record["parameters"] / 1e6:.1f} million parameters, trained from nothing on
Python source.
{reason}This card and the model come from one run of `experiments/pretrain.py`.

## Use and limits

The model is the object that the book quantizes and fine-tunes.
It writes text in the shape of Python, with names and docstrings that look right.
It does not know facts, does not follow instructions, and its code rarely works.
It has seen no text but Python source, nearly all of it with English comments.

## Training

{table([{"property": k, "value": v} for k, v in rows.items()])}

The corpus is the source of the packages below, each at the version given.
Left out are test suites, vendored copies, tables of numbers, and the files that share
eight consecutive lines with a held-out file: {record["dropped_files"]} of them.

{table([{**s, "bytes": f"{s['bytes']:,}"} for s in record["sources"]])}

## Held-out loss

Never trained on: one package, and these top-level modules of the standard library:
{", ".join(record["held_out_modules"])}.

{table([{**s, "bytes": f"{s['bytes']:,}"} for s in record["held_out_sources"]])}

The losses are those of the files in this folder, loaded again after the run.

{table(losses)}

Along the run:

{table(points)}

## Samples

Sampled at temperature 0.7 and top-p 0.9 with a fixed seed, not selected.

{samples}"""


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out rows with equal keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
