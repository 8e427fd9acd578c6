"""A tokenizer, examples and a model small enough to train within a test."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_lib.finetuning.data import InstructionPair, encode_pairs
from qlora_lib.finetuning.training import add_adapters
from qlora_lib.nn import quantize_linears


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and an end-of-sequence token that also pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {byte: i + 1 for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"
    )


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def examples(byte_tokenizer):
    pairs = [InstructionPair("p" * n, "a" * (12 - n)) for n in range(1, 8)]
    return encode_pairs(pairs, byte_tokenizer, max_length=32)


@pytest.fixture
def fresh(tiny_model):
    """Build the same model with adapters any number of times."""
    quantize_linears(tiny_model)
    state = {k: v.clone() for k, v in tiny_model.state_dict().items()}

    def build(**options):
        model = copy.deepcopy(tiny_model)
        model.load_state_dict(state)
        adapter = {"rank": 4, "alpha": 8, "dropout": 0.1, **options}
        # A run must not depend on the numbers drawn here.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return add_adapters(model, **adapter)

    return build
