"""QLoRAConfig: how a model is quantized, as config.json has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_lib.integrations.transformers.layers import empty_weight
from qlora_lib.numerics import Codebook, QuantizedTensor, codebook_by_name
from qlora_lib.numerics.quantized_tensor import FLOAT_DTYPES

# Of the files that save_pretrained writes. To be raised when older code cannot read
# them.
FORMAT_VERSION = 1
COMPUTE_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)


@register_quantization_config("qlora_lib")
class QLoRAConfig(QuantizationConfigMixin):
    """How the linear layers of a model are quantized while it is loaded.

    The layers of the base model become :class:`~qlora_lib.Linear4bit`, one at a time.
    Embeddings, normalization, the output layer and other heads are left in
    ``compute_dtype``, as are weights that are tied to others and modules that the
    model's class asks to keep in float32. Without ``device_map`` the model is loaded
    to the current GPU if there is one.

    ``model.num_parameters()`` counts the numbers that are stored, so two 4-bit codes
    are one of them.

    Args:
        codebook: Name of the data type, see
            :func:`~qlora_lib.numerics.codebook_by_name`.
        block_size: How many consecutive numbers share a scale; None for one scale for
            each weight.
        double_quant: Whether to quantize the scales.
        compute_dtype: The type of everything that is not quantized, and so the type
            that the model computes in: ``"bfloat16"``, ``"float16"``, ``"float32"`` or
            ``"float64"``, or the dtype itself. Weights are rounded to it before they
            are quantized. It takes precedence over ``dtype=`` of ``from_pretrained``
            and over the type in the model's config; if they differ, a warning is
            logged.
        skip_modules: Further modules to leave in ``compute_dtype``, by whole names or
            consecutive parts of them, such as ``["down_proj"]`` or
            ``["layers.0.mlp"]``.
        format_version: Version of the format that a checkpoint was written in.
        quant_method: What transformers calls the method, as it stands in a checkpoint.

    Raises:
        TypeError: If ``block_size``, ``double_quant`` or ``skip_modules`` has another
            type.
        ValueError: If ``codebook`` or ``compute_dtype`` is not known, ``block_size`` is
            below 1, or ``format_version`` is newer than this version of the package.
    """

    # transformers declares an enumeration of its own methods.
    quant_method: Any = "qlora_lib"

    def __init__(
        self,
        codebook: str = "nf4",
        block_size: int | None = 64,
        double_quant: bool = True,
        compute_dtype: str | torch.dtype = "bfloat16",
        skip_modules: Sequence[str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str | None = None,
    ) -> None:
        if quant_method not in (None, self.quant_method):
            raise ValueError(
                f"quant_method must be {self.quant_method!r}, got {quant_method!r}"
            )
        _check_version(format_version)
        _check_block_size(block_size)
        if not isinstance(double_quant, bool):
            raise TypeError(f"double_quant must be True or False, got {double_quant!r}")
        if isinstance(skip_modules, str):
            raise TypeError(
                f"skip_modules must be a list of names, got the string "
                f"{skip_modules!r}: pass [{skip_modules!r}]"
            )
        compute_dtype = str(compute_dtype).removeprefix("torch.")
        if compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, got "
                f"{compute_dtype!r}"
            )
        # All attributes are written to config.json.
        self.quant_method = type(self).quant_method
        self.format_version = format_version
        self.codebook = codebook_by_name(codebook).name
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = compute_dtype
        self.skip_modules = None if skip_modules is None else list(skip_modules)

    @classmethod
    def from_dict(
        cls,
        config_dict: dict[str, Any],
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Read what ``to_dict`` has written.

        Raises:
            ValueError: If it was written by a newer version of the package, or has
                fields that this version does not know.
        """
        # First: the fields of a newer version may be unknown.
        _check_version(config_dict.get("format_version"))
        unknown = config_dict.keys() - cls().__dict__.keys()
        if unknown:
            raise ValueError(
                f"quantization_config of the checkpoint has unknown {sorted(unknown)}: "
                "remove them from its config.json, or save it again"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    @property
    def values(self) -> Codebook:
        """The codebook itself."""
        return codebook_by_name(self.codebook)

    @property
    def dtype(self) -> torch.dtype:
        """``compute_dtype`` itself."""
        dtype: torch.dtype = getattr(torch, self.compute_dtype)
        return dtype

    def empty_weight(self, layer: nn.Module) -> QuantizedTensor:
        """The quantized weight of a layer on the meta device, for its sizes."""
        return empty_weight(
            layer, self.values, self.block_size, self.double_quant, self.dtype
        )


def _check_block_size(block_size: int | None) -> None:
    if block_size is None:
        return
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"block_size must be an integer or None, got {block_size!r}")
    if block_size < 1:
        raise ValueError(
            f"block_size must be at least 1, got {block_size}: use None for one scale "
            "for each weight"
        )


def _check_version(version: object) -> None:
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"quantization_config has format_version {version!r}, and this version of "
            f"qlora_lib reads up to {FORMAT_VERSION}: upgrade it with pip install "
            "--upgrade qlora-lib"
        )
