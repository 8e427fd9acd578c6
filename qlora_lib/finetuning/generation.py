"""Asking a model for a docstring."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_lib.finetuning.data import encode_prompt


@torch.no_grad()
def generate_docstring(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    max_prompt_tokens: int = 256,
    max_new_tokens: int = 32,
) -> str:
    """Return the docstring line that a model finds most likely, token by token.

    Args:
        model: A causal language model; its training mode is restored afterwards.
        tokenizer: Its tokenizer.
        source: Source of a function without its docstring.
        max_prompt_tokens: Longest prompt; the end of a longer source is cut.
        max_new_tokens: Longest answer.

    Returns:
        The answer without special tokens and surrounding white space.
    """
    prompt = encode_prompt(source, tokenizer, max_prompt_tokens)
    input_ids = torch.tensor([prompt], device=model.device)
    was_training = model.training
    model.eval()
    # Every causal model can generate, but the annotation PreTrainedModel cannot say so.
    causal_model: Any = model
    generated = causal_model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.train(was_training)
    answer = tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True)
    return str(answer).strip()
