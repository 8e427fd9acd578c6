"""Libraries that know nothing of this one, on models that it has quantized.

Each test is the script that its library's manual shows, but for importing and passing
a QLoRAConfig.
"""

import pytest
import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from qlora_lib.integrations.transformers import QLoRAConfig
from qlora_lib.nn import Linear4bit

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "def first(items):\n    return items[0]\n",
    "import os\nprint(os.getcwd())\n",
    "class Empty:\n    pass\n",
]
# A task of the harness: which word is the more likely one to follow.
DOCUMENTS = [
    {"text": "import numpy as", "choices": ["np", "return"], "label": 0},
    {"text": "for i in", "choices": ["def", "range(10):"], "label": 1},
    {"text": "if x is not", "choices": ["None:", "import"], "label": 0},
]
NEXT_WORD = {
    "task": "next_word",
    "custom_dataset": lambda **unused: {"test": Dataset.from_list(DOCUMENTS)},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture
def quantized(base_folder):
    return AutoModelForCausalLM.from_pretrained(
        base_folder, quantization_config=QLoRAConfig()
    )


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


# TRL and transformers ask each other by names that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_trl_trains_adapters(quantized, tokenizer, tmp_path):
    before = {name: p.detach().cpu() for name, p in quantized.named_parameters()}
    trainer = SFTTrainer(
        model=quantized,
        args=SFTConfig(
            output_dir=tmp_path,
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 42
    assert all("lora_" in name for name in trained)
    for name, parameter in trainer.model.named_parameters():
        if name not in trained:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter.cpu(), before[plain]), name


def test_lm_eval_scores_a_loaded_model(quantized, tokenizer):
    model = HFLM(pretrained=quantized, tokenizer=tokenizer, batch_size=2)
    pairs = [text.partition("\n")[::2] for text in TEXTS]
    pairs = [(context, f"\n{answer}") for context, answer in pairs]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, answer), (found, _) in zip(
        pairs, model.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        expected = log_likelihood(quantized, tokenizer, context, answer)
        # The batch is padded, so the products have other shapes: bfloat16 logits of
        # about 16 have steps of 1/16.
        assert found == pytest.approx(expected, rel=0.01, abs=0.1)


# The harness passes from_pretrained the config that the checkpoint has.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_lm_eval_loads_and_evaluates_a_checkpoint(quantized, tokenizer, tmp_path):
    """The other way in: the harness itself loads the model, from a folder."""
    quantized.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = HFLM(pretrained=str(tmp_path), device="cpu", batch_size=1)
    layers = [m for m in model.model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 42
    results = simple_evaluate(model=model, tasks=[NEXT_WORD], bootstrap_iters=0)
    correct = []
    for document, sample in zip(
        DOCUMENTS, results["samples"]["next_word"], strict=True
    ):
        scores = [
            log_likelihood(model.model, tokenizer, document["text"], f" {choice}")
            for choice in document["choices"]
        ]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(scores, rel=0.01, abs=0.1)
        correct.append(scores.index(max(scores)) == document["label"])
    accuracy = results["results"]["next_word"]["acc,none"]
    assert accuracy == pytest.approx(sum(correct) / len(correct))


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, answer: str) -> float:
    """The sum of the log-probabilities of the answer's tokens, in float64."""
    whole = tokenizer(context + answer)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    tokens = torch.tensor([whole], device=model.device)
    log_p = model(tokens).logits[0, :-1].double().log_softmax(-1)
    return sum(log_p[i - 1, whole[i]].item() for i in range(start, len(whole)))
