"""4-bit models of transformers: quantized while they are loaded, saved and reloaded.

Importing this module registers :class:`QLoRAConfig` with transformers:

``AutoModelForCausalLM.from_pretrained(id, quantization_config=QLoRAConfig())``

``save_pretrained`` writes the codes and scales of each layer under the names of
:class:`~qlora_lib.Linear4bit`'s parameters, and ``from_pretrained`` reads them back,
without ``quantization_config``. In a program that has not imported this module
transformers warns of an unknown quantization type and then raises an error, since the
shapes of the weights do not fit.

:func:`load_bitsandbytes` and :func:`save_bitsandbytes` exchange models with
bitsandbytes, which is never imported.
"""

from qlora_lib.integrations.transformers.bitsandbytes_loading import load_bitsandbytes
from qlora_lib.integrations.transformers.bitsandbytes_saving import save_bitsandbytes
from qlora_lib.integrations.transformers.config import FORMAT_VERSION, QLoRAConfig
from qlora_lib.integrations.transformers.decoder_layers import (
    compile_decoder_layers,
    enable_gradient_checkpointing,
)
from qlora_lib.integrations.transformers.quantizer import QLoRAQuantizer

__all__ = [
    "FORMAT_VERSION",
    "QLoRAConfig",
    "QLoRAQuantizer",
    "compile_decoder_layers",
    "enable_gradient_checkpointing",
    "load_bitsandbytes",
    "save_bitsandbytes",
]
