"""Training of adapters on a quantized model, and the loss that judges it."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora_lib.finetuning.data import DocstringPair, encode_pairs
from qlora_lib.finetuning.training import answer_losses, finetune
from qlora_lib.nn import quantize_linears

PAIRS = [
    DocstringPair("m", "f", "def f(a):\n    return a + 1", "Add one."),
    DocstringPair("m", "g", "def g(a, b):\n    return a * b", "Multiply two numbers."),
    DocstringPair("m", "h", "def h():\n    return 0", "Return zero always."),
]


@pytest.fixture
def examples(byte_tokenizer):
    return encode_pairs(PAIRS, byte_tokenizer, max_length=96)


@pytest.fixture
def adapted_model(tiny_model):
    quantize_linears(tiny_model)
    torch.manual_seed(1)
    return get_peft_model(
        tiny_model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )


def test_answer_losses_are_the_mean_over_the_answer_alone(
    tiny_model, byte_tokenizer, examples
):
    losses = answer_losses(tiny_model, byte_tokenizer, examples, batch_size=2)
    assert losses.shape == (3,)
    for example, loss in zip(examples, losses, strict=True):
        with torch.no_grad():
            logits = tiny_model(torch.tensor([example["input_ids"]])).logits[0]
        log_p = logits.double().log_softmax(-1)
        answer = [i for i, label in enumerate(example["labels"]) if label != -100]
        expected = -sum(log_p[i - 1, example["input_ids"][i]] for i in answer)
        assert loss.item() == pytest.approx(expected.item() / len(answer), rel=1e-5)


def test_answer_losses_keep_the_training_mode(tiny_model, byte_tokenizer, examples):
    for training in (True, False):
        tiny_model.train(training)
        answer_losses(tiny_model, byte_tokenizer, examples)
        assert tiny_model.training is training


def test_finetune_trains_the_adapters_and_leaves_the_base_alone(
    adapted_model, byte_tokenizer, examples, capsys
):
    before = copy.deepcopy(adapted_model.state_dict())
    held = answer_losses(adapted_model, byte_tokenizer, examples).mean()
    losses = finetune(
        adapted_model,
        byte_tokenizer,
        examples,
        steps=20,
        batch_size=3,
        learning_rate=1e-2,
    )
    assert len(losses) == 20
    assert losses[0] == pytest.approx(held.item(), rel=0.1)
    after = answer_losses(adapted_model, byte_tokenizer, examples).mean()
    assert after < held - 0.5
    changed = {
        name
        for name, tensor in adapted_model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {name for name in before if "lora_" in name}
    assert capsys.readouterr().out == ""


def test_finetune_repeats_with_the_same_seed(adapted_model, byte_tokenizer, examples):
    twin = copy.deepcopy(adapted_model)
    runs = [
        finetune(model, byte_tokenizer, examples, steps=3, batch_size=2, seed=5)
        for model in (adapted_model, twin)
    ]
    assert runs[0] == runs[1]


def test_finetune_refuses_nothing_to_learn_from(adapted_model, byte_tokenizer):
    with pytest.raises(ValueError, match="examples is empty"):
        finetune(adapted_model, byte_tokenizer, [], steps=1)


def test_finetune_refuses_nothing_to_train(tiny_model, byte_tokenizer, examples):
    tiny_model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        finetune(tiny_model, byte_tokenizer, examples, steps=1)


@pytest.mark.parametrize("steps", [0, -1])
def test_finetune_refuses_no_steps(adapted_model, byte_tokenizer, examples, steps):
    with pytest.raises(ValueError, match=f"steps must be .* got {steps}"):
        finetune(adapted_model, byte_tokenizer, examples, steps=steps)


def test_answer_losses_of_nothing(tiny_model, byte_tokenizer):
    with pytest.raises(ValueError, match="examples is empty"):
        answer_losses(tiny_model, byte_tokenizer, [])


def test_a_loss_that_is_no_number_is_returned_as_such(
    adapted_model, byte_tokenizer, examples
):
    adapter = next(p for p in adapted_model.parameters() if p.requires_grad)
    adapter.data.fill_(float("nan"))
    losses = finetune(adapted_model, byte_tokenizer, examples, steps=2)
    assert all(math.isnan(loss) for loss in losses)
