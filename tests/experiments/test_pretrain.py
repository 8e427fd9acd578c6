"""The pretraining script from end to end in small, and the model that it shipped."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import pretrain
from pretrain_card import model_card
from pretrain_corpus import (
    HELD_OUT_PACKAGE,
    STANDARD_LIBRARY,
    Corpus,
    held_out_texts,
    package_files,
    read_files,
    runs,
)
from qlora_lib.finetuning.docstrings import is_held_out, standard_library_pairs
from record import REPOSITORY, RESULTS

MEGABYTE = 1_000_000
SHIPPED = REPOSITORY / "models" / "base"
TINY = pretrain.Size(
    hidden=64,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate=64,
    sequence_length=32,
    batch_size=4,
    learning_rate=1e-2,
    vocabulary=400,
)
MODULE = '''
def function_{0}(values):
    """Return the sum of the values and {0}."""
    total = {0}
    for value in values:
        if value is not None:
            total += value
    return total
'''


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"module_{number:02}.py").write_text(MODULE.format(number))
    texts = read_files(sorted(folder.glob("*.py")))
    source = {"name": "made up", "version": "1", "license": "none", "bytes": 1}
    return Corpus(texts[:32], {"made up": texts[32:]}, [source], [source], 0)


EARLIER_WEIGHTS = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("model")
    for name in EARLIER_WEIGHTS:
        (output / name).write_text("weights of an earlier run")
    budget = pretrain.Budget(steps=12, seconds=0.0)
    record = pretrain.pretrain(TINY, corpus, budget, output, compile_model=False)
    return {"size": "tiny", **record}, output


# The script, in small


def test_weights_of_an_earlier_run_are_gone(run: tuple[dict, Path]) -> None:
    _, output = run
    weights = {path.name for path in output.glob("*.safetensors*")}
    assert weights == {"model.safetensors"}


def test_a_run_saves_a_model_that_the_auto_classes_load(run: tuple[dict, Path]) -> None:
    record, output = run
    tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(output, local_files_only=True)
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == record["parameters"]
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_record_counts_what_was_done(run: tuple[dict, Path]) -> None:
    record, _ = run
    assert record["steps"] == 12
    assert record["tokens_seen"] == 12 * 4 * 32
    first, last = record["curve"][0], record["curve"][-1]
    assert last["tokens"] == record["tokens_seen"]
    assert last["made up, nats per token"] < first["made up, nats per token"]
    # The curve is measured in training, the last loss on the files as saved in bf16.
    loss = record["held_out"]["made up"]["nats_per_token"]
    assert loss == pytest.approx(last["made up, nats per token"], abs=0.05)
    assert all(s["text"].startswith(s["prompt"]) for s in record["samples"])
    json.dumps(record)


def test_the_card_states_the_record(run: tuple[dict, Path]) -> None:
    record, _ = run
    card = model_card(record)
    loss = record["held_out"]["made up"]
    assert f"| made up | {loss['nats_per_token']:.4f} |" in card
    assert f"{record['tokens_seen']:,} in 12 steps" in card
    assert "no accelerator" not in card
    small = {**record, "size": "small", "hardware": "CPU, some, 2 threads"}
    assert "no accelerator was at hand" in model_card(small)


def test_a_budget_in_seconds_ends_the_run_with_the_rate_at_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(pretrain.time, "monotonic", lambda: now)
    budget = pretrain.Budget(steps=None, seconds=60.0)
    assert budget.rate(0) == pytest.approx(1 / budget.WARMUP)
    assert budget.rate(1000) == 1.0
    now = 45.0
    assert budget.rate(1000) == pytest.approx(0.25)
    now = 61.0
    assert budget.rate(1000) == 0.0


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    return pretrain.train_tokenizer(corpus.train, 400)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def f(x):\n    return x\n",
        "\n\n\tif a:\r\n\t\tb  =  1.25 # π ≠ 3, ok 👍\n ",
        " leading and trailing ",
    ],
)
def test_any_text_survives_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_indentation_is_one_token_and_digits_are_single(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert len(tokenizer("\n            ")["input_ids"]) == 1
    assert len(tokenizer("31415")["input_ids"]) == 5


def test_bytes_per_token_counts_the_bytes_of_the_predicted_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = 'print("π = 3.14159 and so on for a while")\n'
    length = len(tokenizer(text)["input_ids"]) + 1
    windows = pretrain.Windows([text, text], tokenizer, length)
    assert len(windows) == 2
    # A window is the end-of-text token and one whole text, which it predicts.
    expected = len(text.encode()) / (length - 1)
    assert windows.bytes_per_token(tokenizer) == pytest.approx(expected)


def test_a_limit_spreads_the_windows_over_the_stream(
    tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    every = pretrain.Windows(corpus.train, tokenizer, 16)
    some = pretrain.Windows(corpus.train, tokenizer, 16, limit=4)
    assert len(some) == 4
    assert torch.equal(some.tokens, every.tokens[:: len(every) // 4][:4])


# The corpus


def test_files_are_read_once_without_tables_and_up_to_the_limit(tmp_path: Path) -> None:
    texts = [MODULE.format(number) for number in range(4)]
    table = "VALUES = [" + "0x00, 0x01, " * 100 + "]\n"
    paths = []
    for number, text in enumerate([*texts, texts[0], table]):
        paths.append(tmp_path / f"{number}.py")
        paths[-1].write_text(text)
    stripped = [text.strip() + "\n" for text in texts]
    assert read_files(paths) == stripped
    assert read_files(paths, max_bytes=2 * len(stripped[0]) + 1) == stripped[:2]


def test_a_copy_of_a_held_out_text_shares_a_run_with_it() -> None:
    original = "\n".join(f"line_{number} = {number}" for number in range(10))
    indented = "class A:\n" + original.replace("line", "    line").replace("\n", "\n\n")
    shuffled = "\n".join(reversed(original.splitlines()))
    known = set(runs(original))
    assert not known.isdisjoint(runs(indented))
    assert known.isdisjoint(runs(shuffled))


def test_package_files_leave_out_test_suites() -> None:
    files = package_files(HELD_OUT_PACKAGE)
    assert len(files) > 100
    assert not any("tests" in path.parts for path in files)
    with pytest.raises(ModuleNotFoundError, match="package='no_such_package'"):
        package_files("no_such_package")


# The model that the repository ships


@pytest.fixture(scope="module")
def shipped() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(
        SHIPPED, local_files_only=True, dtype=torch.float32
    )
    return model.eval(), AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((RESULTS / "pretrain.json").read_text(encoding="utf-8"))


def test_the_shipped_files_stay_small() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    shards = [path for path in files if path.suffix == ".safetensors"]
    assert shards
    assert all(path.stat().st_size <= 12 * MEGABYTE for path in shards)
    assert sum(path.stat().st_size for path in files) <= 24 * MEGABYTE
    names = {path.name for path in files if path not in shards}
    assert names <= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_shipped_model_can_be_quantized_in_blocks_of_64(
    shipped: tuple[LlamaForCausalLM, PreTrainedTokenizerBase], record: dict
) -> None:
    model, tokenizer = shipped
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert all(module.in_features % 64 == 0 for module in linears.values())
    assert model.num_parameters() == record["parameters"]
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings >= 1024
    assert model.config.vocab_size == len(tokenizer) == 4096
    saved = AutoModelForCausalLM.from_pretrained(SHIPPED, local_files_only=True)
    assert saved.dtype == torch.bfloat16


def test_the_shipped_card_and_record_agree(record: dict) -> None:
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert card == model_card(record)
    assert all(is_held_out(name) for name in record["held_out_modules"])
    trained_on = {source["name"] for source in record["sources"]}
    assert HELD_OUT_PACKAGE not in trained_on


def test_the_shipped_model_predicts_held_out_source(
    shipped: tuple[LlamaForCausalLM, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = shipped
    _, held_out = standard_library_pairs()
    sources = [pair.source for pair in held_out[::10] if len(pair.source) < 600]
    nats = bytes_predicted = 0.0
    for source in sources:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(source)["input_ids"]]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        nats += loss * (ids.shape[1] - 1)
        bytes_predicted += len(source.encode())
    bits_per_byte = nats / math.log(2) / bytes_predicted
    counts = Counter(byte for source in sources for byte in source.encode())
    order_0 = -sum(
        n / bytes_predicted * math.log2(n / bytes_predicted) for n in counts.values()
    )
    # A model that knows no bytes needs 8 bits, one that knows how often each occurs
    # about 4.7; what is below that is knowledge of the order of things.
    assert 4 < order_0 < 6
    assert bits_per_byte < 0.5 * order_0


def test_the_recorded_loss_is_that_of_the_shipped_files(
    shipped: tuple[LlamaForCausalLM, PreTrainedTokenizerBase], record: dict
) -> None:
    model, tokenizer = shipped
    texts = held_out_texts()[STANDARD_LIBRARY]
    length = record["configuration"]["sequence_length"]
    windows = pretrain.Windows(texts, tokenizer, length, limit=64)
    loss = pretrain.held_out_loss(model, windows)
    bits_per_byte = loss / windows.bytes_per_token(tokenizer) / math.log(2)
    expected = record["held_out"][STANDARD_LIBRARY]["bits_per_byte"]
    # A quarter of the recorded windows, and of another Python's source on another
    # machine, so the numbers are close and not equal.
    assert bits_per_byte == pytest.approx(expected, abs=0.1)
