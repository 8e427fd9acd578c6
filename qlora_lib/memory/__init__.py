"""Where the bytes of a fine-tuning run go, known before it starts."""

from qlora_lib.memory.estimate import estimate_memory
from qlora_lib.memory.parts import MemoryEstimate, MemoryParts
from qlora_lib.memory.planned_model import llama_config

__all__ = ["MemoryEstimate", "MemoryParts", "estimate_memory", "llama_config"]
