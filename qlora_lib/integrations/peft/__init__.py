"""LoRA adapters of peft beside the 4-bit layers of this library.

Importing this module makes plain peft work on models with
:class:`~qlora_lib.Linear4bit`:

``get_peft_model(model, LoraConfig(target_modules="all-linear"))``

Adapters are ordinary ones: ``save_pretrained`` writes ``adapter_config.json`` and
``adapter_model.safetensors``, which peft loads beside the 16-bit model as well.
``merge_and_unload()`` gives a dense model in 16 bits; :func:`merge_into_4bit` is the
other way and says what it costs.
"""

from qlora_lib.integrations.peft.layer import LoraLinear4bit
from qlora_lib.integrations.peft.loading import load_adapter
from qlora_lib.integrations.peft.loftq import loftq_init
from qlora_lib.integrations.peft.merging import (
    MergeError,
    MergeReport,
    merge_dequantized,
    merge_into_4bit,
)
from qlora_lib.integrations.peft.registration import register

__all__ = [
    "LoraLinear4bit",
    "MergeError",
    "MergeReport",
    "load_adapter",
    "loftq_init",
    "merge_dequantized",
    "merge_into_4bit",
]

register()
