"""How peft learns of Linear4bit, and how a merged model becomes an ordinary one.

peft has a hook for layers it does not know, but on one LoraConfig: it is not saved, so
``PeftModel.from_pretrained`` in a fresh process would put an ordinary LoRA layer beside
the packed codes. Every path of peft that makes a LoRA layer goes through
``LoraModel._create_new_module``, so the hook is set there, on the config that comes by.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from qlora_lib.integrations.peft.layer import LoraLinear4bit, check_adapters
from qlora_lib.integrations.peft.merging import make_dense
from qlora_lib.nn import Linear4bit

MARK = "_knows_linear4bit"


def register() -> None:
    """Teach peft's LoraModel about Linear4bit; a second call changes nothing."""
    if hasattr(LoraModel, MARK):
        return
    create, merge = LoraModel._create_new_module, LoraModel.merge_and_unload

    @functools.wraps(create)
    def create_new_module(lora_config: LoraConfig, *args: Any, **kwargs: Any) -> Any:
        if Linear4bit not in (lora_config._custom_modules or {}):
            lora_config._register_custom_module({Linear4bit: LoraLinear4bit})
        return create(lora_config, *args, **kwargs)

    @functools.wraps(merge)
    def merge_and_unload(
        self: LoraModel,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = [m for m in self.model.modules() if isinstance(m, LoraLinear4bit)]
        if safe_merge:
            # peft checks layer by layer, when others are merged already.
            check_adapters(self.model, adapter_names)
        model = merge(self, progressbar, safe_merge, adapter_names)
        return make_dense(model) if layers else model

    for name, method in (
        ("_create_new_module", staticmethod(create_new_module)),
        ("merge_and_unload", merge_and_unload),
        (MARK, True),
    ):
        setattr(LoraModel, name, method)
