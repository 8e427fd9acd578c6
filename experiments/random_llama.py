"""LLaMA models with random weights, quantized on the device that they are made for.

Time and memory of a training step do not depend on what the weights are. So a model of
65 billion parameters is made where it is needed, matrix by matrix, without a download
and without ever existing in 16 bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import qlora_lib.integrations.peft  # noqa: F401 - tells peft about Linear4bit
from qlora_lib import NF4, Linear4bit, quantize
from qlora_lib.finetuning.training import add_adapters
from qlora_lib.integrations.transformers import enable_gradient_checkpointing

WEIGHT_STD = 0.02
RANK, ALPHA = 64, 16  # the paper's
DTYPE = torch.bfloat16

MakeLayer = Callable[[Tensor], nn.Module]


def random_llama(
    config: LlamaConfig, device: str, make_layer: MakeLayer, seed: int = 0
) -> PreTrainedModel:
    """A causal model in bfloat16 whose linear layers are made from random matrices.

    The same seed gives the same matrices, whatever ``make_layer`` makes of them, as
    long as it draws no random numbers itself.

    Args:
        config: Shape of the model.
        device: Where to make it.
        make_layer: Makes a layer of a bfloat16 weight ``[out_features, in_features]``.
        seed: Seed of all weights.
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(DTYPE)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, child = name.rpartition(".")
            layer = make_layer(random_matrix(module.weight.shape, device))
            setattr(model.get_submodule(parent), child, layer)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                weight = (
                    torch.ones(parameter.shape, device=device, dtype=DTYPE)
                    if parameter.dim() == 1  # norms
                    else random_matrix(parameter.shape, device)
                )
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
    # Its table of frequencies is a buffer, which was made without numbers too.
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.config.use_cache = False
    return model


def linear4bit(weight: Tensor) -> Linear4bit:
    """This library's layer, as the paper configures it."""
    return Linear4bit(quantize(weight, NF4, block_size=64, double_quant=True))


def with_adapters(
    model: PreTrainedModel, gradient_checkpointing: bool = True
) -> nn.Module:
    """The model with the paper's adapters on all linear layers, ready to be trained."""
    torch.manual_seed(0)
    adapted = add_adapters(model, RANK, ALPHA, dropout=0.0)
    if gradient_checkpointing:
        enable_gradient_checkpointing(adapted)
    return adapted.train()


def random_matrix(shape: torch.Size, device: str) -> Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE).mul_(WEIGHT_STD)
