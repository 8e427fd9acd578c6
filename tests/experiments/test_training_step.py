"""The stacks that are timed side by side train the same model."""

import pytest
import torch
from transformers import LlamaConfig

import random_llama
import training_step

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=300,
)


@pytest.mark.parametrize("stack", training_step.STACKS)
def test_a_stack_trains_the_adapters_of_every_linear_layer(stack):
    model = training_step.with_adapters(training_step.STACKS[stack](CONFIG, "cpu"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7  # two matrices, two blocks, seven layers
    assert all("lora_" in name for name in trained)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model.model.model.gradient_checkpointing
    result = training_step.measure(CONFIG, "cpu", stack, "AdamW", (2, 16))
    assert result["last_loss"] < result["first_loss"]


def test_the_stacks_start_from_the_same_weights():
    runs = [
        training_step.measure(CONFIG, "cpu", stack, "AdamW", (1, 32))
        for stack in training_step.STACKS
    ]
    training_step.check_same_loss(runs)
    runs[0]["first_loss"] *= 1.01
    with pytest.raises(AssertionError, match="different models"):
        training_step.check_same_loss(runs)


def test_a_random_model_is_whole_and_repeats_by_its_seed():
    first, second, other = (
        random_llama.random_llama(CONFIG, "cpu", random_llama.linear4bit, seed)
        for seed in (0, 0, 1)
    )
    assert not any(p.is_meta for p in first.parameters())
    assert not any(b.is_meta for b in first.buffers())
    tokens = torch.arange(16)[None]
    logits = [model(input_ids=tokens).logits for model in (first, second, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
