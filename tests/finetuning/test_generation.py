"""Greedy answers, cut at the prompt and at the end-of-sequence token."""

import torch

from qlora_lib.finetuning.data import INSTRUCTION
from qlora_lib.finetuning.generation import generate_docstring

SOURCE = "def f(a):\n    return a + 1"


def test_answer_is_the_greedy_continuation(tiny_model, byte_tokenizer):
    tiny_model.train()
    answer = generate_docstring(tiny_model, byte_tokenizer, SOURCE, max_new_tokens=5)
    assert tiny_model.training
    tiny_model.eval()
    ids = byte_tokenizer(SOURCE + INSTRUCTION)["input_ids"]
    expected = []
    for _ in range(5):
        with torch.no_grad():
            token = int(
                tiny_model(torch.tensor([ids + expected])).logits[0, -1].argmax()
            )
        if token == byte_tokenizer.eos_token_id:
            break
        expected.append(token)
    assert answer == byte_tokenizer.decode(expected).strip()


def test_a_long_source_is_cut_and_the_answer_has_no_prompt(tiny_model, byte_tokenizer):
    answer = generate_docstring(
        tiny_model, byte_tokenizer, SOURCE * 50, max_prompt_tokens=64, max_new_tokens=3
    )
    assert INSTRUCTION.strip() not in answer
    assert len(answer) <= 12
