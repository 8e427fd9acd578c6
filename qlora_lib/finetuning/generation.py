"""Asking a model: any prompt, and the source of a function for its docstring."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_lib.finetuning.data import encode_prompt, padding_token
from qlora_lib.finetuning.docstrings import INSTRUCTION
from qlora_lib.finetuning.modes import evaluating

# Models of the hub bring settings of their own, such as a penalty for repetitions, and
# what is not given here is taken from those.
_UNCHANGED_LOGITS = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": None,
    "min_p": None,
    "typical_p": 1.0,
}


@torch.no_grad()
def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    cue: str = "",
    max_prompt_tokens: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> str:
    """Return a model's answer to a prompt.

    Args:
        model: A causal language model; its training mode is restored afterwards.
        tokenizer: Its tokenizer.
        prompt: What is asked; it is not blank.
        cue: What the model was trained to see between prompt and answer.
        max_prompt_tokens: Longest prompt with its cue; the end of a longer one is cut,
            as in training. By default nothing is.
        max_new_tokens: Longest answer, at least 1.
        temperature: 0 for the most likely token each time. Above it tokens are drawn
            from ``softmax(logits / temperature)``, by the random numbers of
            ``torch.manual_seed``. The paper's chatbots answered at 0.7 with
            ``top_p=0.9``.
        top_p: Share of the probability, held by the most likely tokens, that is drawn
            from; in (0, 1].

    Returns:
        The answer without special tokens and surrounding white space. It ends at the
        end token of the tokenizer, with which answers end in training, or at one that
        the model's own settings name.

    Raises:
        ValueError: If the prompt is blank, none of it fits, or a number is out of
            range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    ids = encode_prompt(prompt, tokenizer, max_prompt_tokens, cue)
    input_ids = torch.tensor([ids], device=model.device)
    sampling: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    if temperature > 0:
        # top_k is 50 by default, which would be a second, unasked cut.
        sampling = {
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 0,
        }
    # Every causal model can generate, but the annotation PreTrainedModel cannot say so.
    causal_model: Any = model
    with evaluating(model):
        generated = causal_model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding_token(tokenizer),
            eos_token_id=_ends(causal_model, tokenizer),
            use_cache=True,
            **_UNCHANGED_LOGITS,
            **sampling,
        )
    answer = tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True)
    return str(answer).strip()


def generate_docstring(
    model: PreTrainedModel | PeftModel,
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

    Raises:
        ValueError: As :func:`generate` does.
    """
    return generate(
        model,
        tokenizer,
        source,
        cue=INSTRUCTION,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
    )


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    ends = model.generation_config.eos_token_id
    tokens = set(ends if isinstance(ends, list) else [ends])
    return sorted((tokens | {tokenizer.eos_token_id}) - {None}) or None
