"""Loading a model and its tokenizer, from a folder or from the hub.

Around ``from_pretrained`` of transformers: what is in a folder and how it is quantized
is found out before any weight is read, and what transformers and the hub raise is said
in a sentence with a cure.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora_lib.integrations.bitsandbytes import CODEBOOKS
from qlora_lib.integrations.transformers import QLoRAConfig, load_bitsandbytes


def load_config(model: str) -> PreTrainedConfig:
    """Read the configuration of a causal language model; no weight is read.

    Args:
        model: A folder that ``save_pretrained`` has written, or an id of the hub.

    Raises:
        FileNotFoundError: If ``model`` is a path and nothing is there.
        NotADirectoryError: If it is a file.
        ConnectionError: If it is an id and the hub cannot be reached.
        ValueError: If there is no model of that id, or it is no causal language model.
    """
    _check_local(model)
    with _explained(model):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model={model!r} is of the type {config.model_type!r}, which is no causal "
            "language model: pass one that continues text, such as Llama or Qwen"
        )
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        FileNotFoundError: If ``model`` is a path and nothing is there.
        ConnectionError: If it is an id and the hub cannot be reached.
        ValueError: If the model has no tokenizer, or it cannot be read.
    """
    _check_local(model)
    with _explained(model, part="tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, trust_remote_code=False
        )
    return tokenizer


def quantization_of(config: PreTrainedConfig, **asked: Any) -> QLoRAConfig:
    """Tell how a model is quantized once it is loaded.

    A checkpoint in 4 bits stays as it is, and one in 16 bits is quantized as asked for.

    Args:
        config: What :func:`load_config` has returned.
        **asked: Arguments of :class:`~qlora_lib.integrations.transformers.QLoRAConfig`.
            Those that are not given have its defaults.

    Raises:
        TypeError: If an argument has another type than QLoRAConfig takes.
        ValueError: If an argument has a value that is not known, the checkpoint was
            quantized by another method or written by a newer version of this package,
            or it is quantized otherwise than asked for.
    """
    saved = _saved_quantization(config)
    if saved is None:
        return QLoRAConfig(**asked)
    source = config.name_or_path
    if saved.get("quant_method") == "qlora_lib":
        found: QLoRAConfig = QLoRAConfig.from_dict(saved)
    elif _is_bitsandbytes(saved):
        # Its block size stands beside the weights only; nearly always it is 64.
        found = QLoRAConfig(
            codebook=CODEBOOKS[saved["bnb_4bit_quant_type"]].name,
            double_quant=bool(saved.get("bnb_4bit_use_double_quant")),
            compute_dtype=asked.get("compute_dtype", config.dtype or torch.bfloat16),
        )
    else:
        raise ValueError(
            f"model={source!r} is quantized already, by {saved.get('quant_method')!r}: "
            "pass the 16-bit model it was made from, or a 4-bit one of qlora_lib or "
            "bitsandbytes"
        )
    wanted = QLoRAConfig(**asked)
    for name in asked:
        now, then = getattr(wanted, name), getattr(found, name)
        if now != then:
            raise ValueError(
                f"{name}={now!r} is asked for, but model={source!r} is quantized "
                f"already, with {name}={then!r}: pass the 16-bit model it was made "
                f"from, or leave {name} out"
            )
    return found


def load_model(
    model: str, *, device: str | None = None, dense: bool = False, **asked: Any
) -> PreTrainedModel:
    """Load a causal language model in 4 bits.

    A checkpoint in 16 bits is quantized weight by weight; one in 4 bits, of this
    library or of bitsandbytes, is loaded as it is.

    Args:
        model: A folder that ``save_pretrained`` has written, or an id of the hub.
        device: Where to load it, such as ``"cpu"``; by default to the GPU, if there is
            one.
        dense: Whether to leave a checkpoint in 16 bits as it is. Nothing can be asked
            for beside it.
        **asked: As for :func:`quantization_of`.

    Raises:
        OSError: As :func:`load_config`, or if the weights are missing.
        TypeError: As :func:`quantization_of`.
        ValueError: As :func:`load_config` and :func:`quantization_of`. Also if the
            weights are damaged, there is no linear layer to quantize, or ``dense`` is
            asked for and the checkpoint has 4 bits.
    """
    if dense and asked:
        raise ValueError(
            f"dense=True does not quantize: leave out {', '.join(asked)}, or dense"
        )
    config = load_config(model)
    saved = _saved_quantization(config)
    if dense and saved is not None:
        raise ValueError(f"model={model!r} is quantized already: load it without dense")
    options: dict[str, Any] = {"trust_remote_code": False}
    options["device_map"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    if dense:
        options["dtype"] = "auto"
    else:
        quantization = quantization_of(config, **asked)
        options["dtype"] = quantization.dtype
        if saved is None:
            options["quantization_config"] = quantization
        elif _is_bitsandbytes(saved):
            load = load_bitsandbytes
    with _explained(model):
        if not dense:
            return load(model, **options)
        loaded, info = load(model, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"model={model!r} lacks weights, for example {missing}: copy it again, it "
            "may be cut short"
        )
    return loaded


def _saved_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    saved = getattr(config, "quantization_config", None)
    return saved if saved is None or isinstance(saved, dict) else saved.to_dict()


def _is_bitsandbytes(saved: dict[str, Any]) -> bool:
    return (
        saved.get("quant_method") == "bitsandbytes"
        and bool(saved.get("load_in_4bit"))
        and saved.get("bnb_4bit_quant_type") in CODEBOOKS
    )


def _check_local(model: str) -> None:
    """Look at a path before the hub is asked for an id that looks like one."""
    path = Path(model)
    if path.is_file():
        raise NotADirectoryError(
            f"model={model!r} is a file: pass the folder that holds it and config.json"
        )
    if path.is_dir():
        if (path / "config.json").is_file():
            return
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"model={model!r} is an adapter: pass the base model it was trained "
                "for, and the adapter beside it"
            )
        raise ValueError(
            f"model={model!r} is a folder without config.json: pass one that "
            "save_pretrained of a model has written"
        )
    # An id of the hub is a name, or an owner and a name.
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise FileNotFoundError(
            f"model={model!r} does not exist: pass the folder of a model, or an id of "
            "the hub"
        )


@contextmanager
def _explained(model: str, part: str = "model") -> Iterator[None]:
    """Say what transformers and the hub raise in a sentence, with a cure."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(_unreadable(model, error)) from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise ValueError(_unreadable(model, error)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        causes = tuple(_chain(error))
        if isinstance(error, ValueError) and str(error).startswith(f"{model} "):
            raise  # of this library, which has said it all
        if found := _hub_error(model, causes):
            raise found from error
        if part == "tokenizer":
            raise ValueError(
                f"model={model!r} has no tokenizer that can be read: copy its "
                "tokenizer.json and tokenizer_config.json beside config.json"
            ) from error
        raise


def _unreadable(model: str, error: Exception) -> str:
    return (
        f"model={model!r} has a weight file that cannot be read ({error}), it may be "
        "cut short: copy or download it again"
    )


def _hub_error(model: str, causes: tuple[BaseException, ...]) -> Exception | None:
    def caused_by(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if caused_by(GatedRepoError):
        return ValueError(
            f"model={model!r} is given to those only who accept its terms: accept them "
            "on its page of the hub, and log in with hf auth login"
        )
    if caused_by(RepositoryNotFoundError):
        return ValueError(
            f"model={model!r} is no local folder, and the hub has no public model of "
            "that id: check its spelling, or log in with hf auth login"
        )
    if caused_by(HFValidationError):
        return FileNotFoundError(
            f"model={model!r} is no local folder, and cannot be an id of the hub: "
            "check its spelling"
        )
    # Also where a local folder lacks a file: transformers then asks for its name.
    if caused_by(LocalEntryNotFoundError) and not Path(model).is_dir():
        return ConnectionError(
            f"model={model!r} is no local folder, and the hub cannot be reached: pass "
            "the path of a folder, or run once with a connection (and without "
            "HF_HUB_OFFLINE), after which the model is read from the cache"
        )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
