"""Plain peft on 4-bit models: train, save, load in a fresh process, merge, unmerge."""

import copy
import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from qlora_lib import FP4, NF4, Linear4bit
from qlora_lib.integrations.peft import (
    LoraLinear4bit,
    load_adapter,
    loftq_init,
    merge_dequantized,
    merge_into_4bit,
    registration,
)
from qlora_lib.nn import loftq_split, quantize_linears

# What peft before 0.21 says of a model without a name.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in")

HIDDEN = 64
IDS = torch.arange(24).view(2, 12)
QUERY = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


def make_dense(
    seed: int = 0, dtype: torch.dtype = torch.float32, **fields: object
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 50,
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "tie_word_embeddings": False,
            "dtype": dtype,
            **fields,
        }
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def make_model(seed: int = 0, **fields: object) -> LlamaForCausalLM:
    model = make_dense(seed, **fields)
    quantize_linears(model)
    return model


def make_config(**fields: object) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields},
        task_type="CAUSAL_LM",
    )


def randomize(model: nn.Module, seed: int = 1, scale: float = 0.05) -> None:
    """As if it had been trained: B is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.copy_(values)
        elif "magnitude" in name:
            noise = torch.rand(parameter.shape, generator=generator) + 0.5
            parameter.data.mul_(noise)


def make_adapted(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    model_fields: dict[str, object] | None = None,
    **fields: object,
):
    torch.manual_seed(7)
    model = make_model(seed, dtype=dtype, **(model_fields or {}))
    model = get_peft_model(model, make_config(**fields)).eval()
    randomize(model)
    return model


@torch.no_grad()
def logits(model: nn.Module, **kwargs: object) -> torch.Tensor:
    return model(input_ids=IDS, **kwargs).logits


def dense_twin(model: PeftModel, **fields: object) -> PeftModel:
    """peft's own layers beside the dequantized weights, with the same adapter."""
    base = make_dense()
    adapted = model.get_base_model()
    for name, module in list(base.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        layer = adapted.get_submodule(name)
        if isinstance(layer, LoraLinear4bit):
            layer = layer.quantized_layer
        if isinstance(layer, Linear4bit):
            module.weight.data = layer.dequantize()
    twin = get_peft_model(base, make_config(**fields)).eval()
    state = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert not twin.load_state_dict(state, strict=False).unexpected_keys
    return twin


def lora_layers(model: nn.Module) -> dict[str, LoraLinear4bit]:
    found = model.named_modules()
    return {name: m for name, m in found if isinstance(m, LoraLinear4bit)}


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class TestGetPeftModel:
    def test_every_4bit_layer_gets_an_adapter_and_no_other(self):
        model = get_peft_model(make_model(), make_config())
        assert len(lora_layers(model)) == 2 * 7
        assert type(model.get_base_model().lm_head) is nn.Linear
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained and all("lora_" in name for name in trained)

    def test_ordinary_layers_get_ordinary_adapters(self):
        model = get_peft_model(
            make_model(), make_config(target_modules=["q_proj", "lm_head"])
        )
        head = model.get_base_model().lm_head
        assert not isinstance(head, LoraLinear4bit)
        assert type(head).__name__ == "Linear" and hasattr(head, "lora_A")
        dense = get_peft_model(make_dense(), make_config())
        assert not lora_layers(dense)

    def test_a_config_made_before_the_import_works_too(self):
        config = make_config()
        assert not config._custom_modules
        get_peft_model(make_model(), config)
        assert len(lora_layers(get_peft_model(make_model(), config))) == 14

    def test_registering_twice_changes_nothing(self):
        before = LoraModel._create_new_module, LoraModel.merge_and_unload
        registration.register()
        assert before == (LoraModel._create_new_module, LoraModel.merge_and_unload)

    def test_a_layer_class_of_the_user_has_precedence(self):
        class Own(LoraLinear4bit):
            pass

        config = make_config()
        config._register_custom_module({Linear4bit: Own})
        layers = lora_layers(get_peft_model(make_model(), config))
        assert {type(layer) for layer in layers.values()} == {Own}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_adapters_are_float32_beside_a_16_bit_model(self, dtype):
        model = get_peft_model(make_model(dtype=dtype), make_config(use_dora=True))
        adapters = [p for n, p in model.named_parameters() if "lora_" in n]
        assert {p.dtype for p in adapters} == {torch.float32}
        assert logits(model).dtype == dtype

    def test_transformers_own_add_adapter(self):
        model = make_model()
        model.add_adapter(make_config())
        assert len(lora_layers(model)) == 14

    @pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
    def test_biases_train_if_asked_for(self, bias):
        model = make_model(attention_bias=True)
        model = get_peft_model(model, make_config(bias=bias))
        model(input_ids=IDS, labels=IDS).loss.backward()
        biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
        assert len(biases) == 8
        assert {p.grad is not None for p in biases} == {bias != "none"}


class TestForward:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"use_rslora": True},
            {"use_dora": True},
            {"init_lora_weights": "gaussian"},
            {"lora_bias": True},
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
        ],
        ids=lambda fields: next(iter(fields), "lora"),
    )
    # peft says that a bias of an adapter cannot be merged into a layer without one.
    @pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
    def test_output_and_gradients_are_those_of_peft_beside_the_dense_weight(
        self, fields
    ):
        model = make_adapted(**fields)
        twin = dense_twin(model, **fields)
        torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-5)
        for each in (model, twin):
            each(input_ids=IDS, labels=IDS).loss.backward()
        gradients = dict(twin.named_parameters())
        checked = 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                expected = gradients[name].grad
                torch.testing.assert_close(
                    parameter.grad, expected, rtol=1e-3, atol=1e-6
                )
                checked += 1
        assert checked >= 28

    def test_a_single_adapter_takes_the_fast_path(self, monkeypatch):
        calls = []
        monkeypatch.setattr(
            LoraLinear4bit,
            "_apply_single",
            lambda layer, x, name: calls.append(name) or layer.base_layer(x),
        )
        model = make_adapted()
        logits(model)
        assert calls == 14 * ["default"]
        calls.clear()
        logits(make_adapted(use_dora=True))
        assert not calls

    def test_hooks_of_the_4bit_layer_are_called(self):
        model = make_adapted()
        before = logits(model)
        seen = []
        base = lora_layers(model)[f"{PREFIX}{QUERY}"].quantized_layer
        base.register_forward_hook(lambda *arguments: seen.append(1))
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
        assert seen

    @pytest.mark.parametrize("place", ["base_layer", "lora_A.default"])
    def test_other_hooks_are_called_too(self, place):
        model = make_adapted()
        seen = []
        layer = lora_layers(model)[f"{PREFIX}{QUERY}"].get_submodule(place)
        layer.register_full_backward_hook(lambda *arguments: seen.append("backward"))
        if place != "base_layer":
            layer.register_forward_hook(lambda *arguments: seen.append("forward"))
        model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        expected = ["backward"] if place == "base_layer" else ["forward", "backward"]
        assert seen == expected

    def test_dropout_is_applied_while_training_only(self):
        model = make_adapted(lora_dropout=0.5)
        assert torch.equal(logits(model), logits(model))
        torch.testing.assert_close(
            logits(model), logits(dense_twin(model)), rtol=1e-4, atol=1e-5
        )
        model.train()
        assert not torch.equal(logits(model), logits(model))

    # The new name is not in all versions of transformers that are supported.
    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
    def test_gradient_checkpointing_gives_the_same_gradients(self):
        results = []
        for enabled in (False, True):
            model = make_adapted(lora_dropout=0.3).train()
            if enabled:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(3)
            model(input_ids=IDS, labels=IDS).loss.backward()
            results.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

    def test_several_adapters(self):
        model = make_adapted()
        first = logits(model)
        model.add_adapter("second", make_config(r=2))
        randomize(model, seed=9)
        # randomize has changed both
        first = logits(model)
        model.set_adapter("second")
        second = logits(model)
        assert not torch.allclose(first, second)
        model.base_model.set_adapter(["default", "second"])
        both = logits(model)
        assert not torch.allclose(both, first) and not torch.allclose(both, second)
        with model.disable_adapter():
            plain = logits(model)
        assert torch.equal(plain, logits(make_model()))
        model.delete_adapter("second")
        model.set_adapter("default")
        assert torch.equal(logits(model), first)

    def test_batches_of_mixed_adapters(self):
        model = make_adapted()
        model.add_adapter("second", make_config(r=2))
        randomize(model, seed=9)
        first = logits(model)
        model.set_adapter("second")
        second = logits(model)
        mixed = logits(model, adapter_names=["default", "second"])
        torch.testing.assert_close(mixed[0], first[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed[1], second[1], rtol=1e-4, atol=1e-5)
        base = logits(model, adapter_names=["__base__", "__base__"])
        torch.testing.assert_close(base, logits(make_model()), rtol=1e-4, atol=1e-5)

    def test_autocast(self):
        model = make_adapted()
        with torch.autocast("cpu", torch.bfloat16):
            result = logits(model)
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), logits(model), rtol=0, atol=0.02)

    def test_the_whole_model_trains(self):
        model = get_peft_model(make_model(dtype=torch.bfloat16), make_config()).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        losses = []
        for _ in range(25):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]


# What peft has to say of one of them before it makes a layer.
@pytest.mark.filterwarnings("ignore:lora with eva initialization")
@pytest.mark.parametrize(
    "name",
    ["pissa", "pissa_niter_4", "olora", "orthogonal", "corda", "eva", "lora_ga"],
)
def test_an_initialization_that_needs_the_dense_weight_is_refused(name):
    config = make_config()
    config.init_lora_weights = name  # some of them want a further config first
    model = make_model()
    before = logits(model)
    with pytest.raises(ValueError, match=f"init_lora_weights='{name}' needs the dense"):
        get_peft_model(model, config)
    assert not lora_layers(model)
    assert torch.equal(logits(model), before)


def test_plain_loftq_is_refused_and_points_to_loftq_init():
    config = make_config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    with pytest.raises(ValueError, match=r"'loftq'.*loftq_init"):
        get_peft_model(make_model(), config)


def test_a_refused_second_adapter_leaves_the_first():
    model = make_adapted()
    before = logits(model)
    with pytest.raises(ValueError, match="'olora' needs the dense"):
        model.add_adapter("second", make_config(init_lora_weights="olora"))
    assert torch.equal(logits(model), before)
    assert list(model.peft_config) == ["default"]


def test_variants_that_are_not_supported_are_refused():
    config = make_config(alora_invocation_tokens=[1])
    with pytest.raises(ValueError, match=r"ALora.* use LoRA, rank-stabilized LoRA or"):
        get_peft_model(make_model(), config)


class TestSaveAndLoad:
    @pytest.mark.parametrize(
        "fields", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str
    )
    def test_round_trip(self, tmp_path, fields):
        model = make_adapted(**fields)
        model.save_pretrained(tmp_path)
        loaded = load_adapter(make_model(), tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        assert not any(p.requires_grad for p in loaded.parameters())
        trainable = load_adapter(make_model(), tmp_path, is_trainable=True)
        assert any(p.requires_grad for p in trainable.parameters())

    def test_the_file_is_an_ordinary_adapter(self, tmp_path):
        model = make_adapted()
        model.save_pretrained(tmp_path)
        dense = make_dense()
        ordinary = get_peft_model(make_dense(), make_config())
        ordinary.save_pretrained(tmp_path / "ordinary")
        expected = load_file(tmp_path / "ordinary" / "adapter_model.safetensors")
        found = load_file(tmp_path / "adapter_model.safetensors")
        shapes = {k: (v.shape, v.dtype) for k, v in found.items()}
        assert shapes == {k: (v.shape, v.dtype) for k, v in expected.items()}
        loaded = PeftModel.from_pretrained(dense, tmp_path)
        for name, layer in lora_layers(model).items():
            other = loaded.get_submodule(name)
            assert torch.equal(
                other.lora_B.default.weight, layer.matrices("default")[1]
            )

    def test_merging_adds_no_entry(self):
        model = make_adapted(model_fields={"attention_bias": True})
        state, parameters = model.state_dict().keys(), dict(model.named_parameters())
        model.merge_adapter()
        assert model.state_dict().keys() == state
        assert dict(model.named_parameters()).keys() == parameters.keys()

    def test_saved_while_merged(self, tmp_path):
        model = make_adapted()
        before = logits(model)
        model.merge_adapter()
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(load_adapter(make_model(), tmp_path)), before)

    def test_a_fresh_process_that_imports_the_library(self, tmp_path):
        model = make_adapted()
        model.save_pretrained(tmp_path / "adapter")
        program = """
            import sys, torch
            sys.path.insert(0, sys.argv[1])
            from test_peft import IDS, lora_layers, make_model
            from peft import PeftModel
            model = PeftModel.from_pretrained(make_model(), sys.argv[2] + "/adapter")
            assert len(lora_layers(model)) == 14
            torch.save(model(input_ids=IDS).logits, sys.argv[2] + "/logits.pt")
        """
        tests = Path(__file__).parent
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), tests, tmp_path],
            check=True,
        )
        found = torch.load(tmp_path / "logits.pt")
        assert torch.equal(found, logits(model))

    def test_modules_to_save_travel_along(self, tmp_path):
        model = make_adapted(modules_to_save=["lm_head"])
        head = model.get_base_model().lm_head
        head.modules_to_save.default.weight.data.normal_()
        model.save_pretrained(tmp_path)
        loaded = load_adapter(make_model(), tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        merged = loaded.merge_and_unload()
        assert torch.equal(merged.lm_head.weight, head.modules_to_save.default.weight)


class TestLoadAdapterRefuses:
    @pytest.fixture
    def folder(self, tmp_path):
        make_adapted().save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        edit_json(path, base_model_name_or_path="hub/base-7b")
        return tmp_path

    def check_unchanged(self, model, before):
        assert not lora_layers(model) and not hasattr(model, "peft_config")
        assert torch.equal(logits(model), before)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"intermediate_size": 128},
                r"mlp\.down_proj\.lora_A\.weight has shape \(4, 96\).*"
                r"needs \(4, 128\).*hub/base-7b.*other-13b",
            ),
            (
                {"num_key_value_heads": 4},
                r"k_proj\.lora_B\.weight has shape \(32, 4\) .* needs \(64, 4\)",
            ),
            (
                {"num_hidden_layers": 1},
                r"no layer model\.layers\.1\.\S+; .*hub/base-7b.*other-13b",
            ),
        ],
    )
    def test_an_adapter_of_another_model(self, folder, fields, message):
        model = make_model(**fields)
        model.config.name_or_path = "hub/other-13b"
        before = logits(model)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, folder)
        self.check_unchanged(model, before)

    def test_an_adapter_of_a_model_with_fewer_layers(self, tmp_path):
        make_adapted(target_modules=["q_proj"]).save_pretrained(tmp_path)
        model = make_model(num_hidden_layers=3)
        before = logits(model)
        with pytest.raises(ValueError, match=r"no weights model\.layers\.2\.\S+lora_A"):
            load_adapter(model, tmp_path)
        self.check_unchanged(model, before)

    def test_a_module_that_was_trained_whole(self, tmp_path):
        make_adapted(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"lm_head.weight has shape \(50, 64\)"):
            load_adapter(make_model(vocab_size=60), tmp_path)

    def test_another_name_with_the_same_shapes_is_warned_of(self, folder):
        model = make_model()
        model.config.name_or_path = "hub/relative-7b"
        with pytest.warns(UserWarning, match=r"hub/base-7b.*hub/relative-7b"):
            load_adapter(model, folder)

    @pytest.mark.parametrize("name", ["", "/elsewhere/base-7b", "base-7b/"])
    def test_a_model_that_was_moved_is_not_warned_of(self, folder, name):
        model = make_model()
        model.config.name_or_path = name
        with warnings.catch_warnings():
            warnings.filterwarnings("error", category=UserWarning)
            load_adapter(model, folder)

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"adapter_config.json.*nowhere"):
            load_adapter(make_model(), tmp_path / "nowhere")

    @pytest.mark.parametrize("kept", [0, 5, 2000])
    def test_weights_that_are_cut_short(self, folder, kept):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        model = make_model()
        before = logits(model)
        with pytest.raises(ValueError, match=r"adapter_model.*cannot be read.*short"):
            load_adapter(model, folder)
        self.check_unchanged(model, before)

    def test_a_config_that_is_cut_short(self, folder):
        path = folder / "adapter_config.json"
        path.write_text(path.read_text()[:40])
        with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read"):
            load_adapter(make_model(), folder)

    def test_another_kind_of_adapter(self, folder):
        (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
        with pytest.raises(ValueError, match=r"has peft_type .*IA3, and only LORA"):
            load_adapter(make_model(), folder)

    def test_an_entry_missing(self, folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        kept = {k: v for k, v in tensors.items() if QUERY not in k}
        assert len(kept) == len(tensors) - 2
        save_file(kept, path)
        with pytest.raises(ValueError, match=f"no weights {QUERY}.lora_A"):
            load_adapter(make_model(), folder)

    def test_half_an_adapter(self, folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        del tensors[f"{PREFIX}{QUERY}.lora_B.weight"]
        save_file(tensors, path)
        with pytest.raises(ValueError, match=f"no weights {QUERY}.lora_B"):
            load_adapter(make_model(), folder)

    def test_a_model_with_adapters(self, folder):
        with pytest.raises(TypeError, match="has adapters already"):
            load_adapter(make_adapted(), folder)


def merge_by_hand(model: PeftModel) -> dict[str, torch.Tensor]:
    """The merged weights in float64."""
    merged = {}
    for name, layer in lora_layers(model).items():
        base = layer.quantized_layer.quantized_weight.dequantize(torch.float64)
        a, b = (matrix.double() for matrix in layer.matrices("default"))
        merged[name.removeprefix(PREFIX)] = base + layer.scaling["default"] * b @ a
    return merged


class TestMerge:
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
    )
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_weights_are_rounded_once(self, dtype, use_rslora):
        model = make_adapted(dtype=dtype, use_rslora=use_rslora)
        expected = merge_by_hand(model)
        merged = merge_dequantized(model)
        for name, exact in expected.items():
            layer = merged.get_submodule(name)
            assert type(layer) is nn.Linear and layer.weight.dtype == dtype
            u = torch.finfo(dtype).eps / 2
            # One rounding of the sum, and float32 in front of it.
            error = (layer.weight.double() - exact).abs()
            assert (error <= u * exact.abs() + 4e-7).all()
        assert {p.dtype for p in merged.parameters()} == {dtype}

    @pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
    def test_outputs_stay(self, fields):
        model = make_adapted(**fields)
        before = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
    def test_unmerge_is_exact(self, fields):
        model = make_adapted(**fields)
        state = copy.deepcopy(model.state_dict())
        before = logits(model)
        for _ in range(3):
            model.merge_adapter()
            assert not torch.equal(logits(model), before)
            model.unmerge_adapter()
        assert torch.equal(logits(model), before)
        after = model.state_dict()
        assert state.keys() == after.keys()
        assert all(torch.equal(state[key], after[key]) for key in state)

    def test_a_merged_layer_that_is_given_no_adapter_names(self):
        model = make_adapted()
        model.merge_adapter()
        layer = next(m for m in model.modules() if isinstance(m, LoraLinear4bit))
        x = torch.randn(3, layer.in_features)
        assert torch.equal(layer(x, adapter_names=None), layer(x))

    def test_loftq_of_a_merged_adapter_is_refused(self):
        model = make_adapted()
        model.merge_adapter()
        with pytest.raises(ValueError, match="is merged .*unmerge_adapter"):
            loftq_init(model, make_dense().state_dict())

    def test_disabling_unmerges(self):
        model = make_adapted()
        before = logits(model)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(make_model()))
        assert torch.equal(logits(model), before)

    def test_merging_twice_merges_once(self):
        model = make_adapted()
        model.merge_adapter()
        once = logits(model)
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert torch.equal(logits(model), once)

    def test_unmerging_nothing_warns(self):
        model = make_adapted()
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()

    def test_a_second_adapter_is_merged_onto_the_first(self):
        model = make_adapted()
        model.add_adapter("second", make_config(r=2))
        randomize(model, seed=9)
        model.base_model.set_adapter(["default", "second"])
        both = logits(model)
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="additionally merging second"):
            model.merge_adapter(["second"])
        torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)

    def test_two_dora_adapters_are_merged_as_they_are_applied(self):
        # peft before 0.21 merges its own with the norm of a weight merged already.
        model = make_adapted(use_dora=True)
        model.add_adapter("second", make_config(r=2, use_dora=True))
        randomize(model, seed=9)
        model.base_model.set_adapter(["default", "second"])
        before = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-5)

    def test_a_bias_of_the_adapter(self):
        torch.manual_seed(0)
        model = make_model(attention_bias=True)
        config = make_config(target_modules=["q_proj"], lora_bias=True)
        model = get_peft_model(model, config).eval()
        randomize(model)
        for layer in lora_layers(model).values():
            assert layer.lora_B.default.bias.abs().sum() > 0
        before = logits(model)
        merged = merge_dequantized(model)
        torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)

    # peft says so when the adapter is made.
    @pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
    def test_a_bias_that_has_no_place_is_refused(self):
        model = make_adapted(lora_bias=True)
        with pytest.raises(RuntimeError, match="has a bias, which cannot be merged"):
            model.merge_adapter()

    # As above.
    @pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
    @pytest.mark.parametrize("merge", [merge_dequantized, merge_into_4bit])
    def test_a_bias_that_fits_some_layers_only_changes_nothing(self, merge):
        # Attention comes first, and has biases; the other layers have none.
        model = make_adapted(model_fields={"attention_bias": True}, lora_bias=True)
        with pytest.raises(RuntimeError, match="has a bias, which cannot be merged"):
            merge(model)
        assert len(lora_layers(model)) == 14
        assert not any(layer.merged for layer in lora_layers(model).values())

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("merge", [merge_dequantized, merge_into_4bit])
    def test_a_broken_adapter_is_refused_before_anything_is_merged(self, merge, value):
        model = make_adapted()
        last = list(lora_layers(model).values())[-1]
        last.lora_B.default.weight.data[0, 0] = value
        with pytest.raises(ValueError, match=r"NaN or infinity at layer \S*layers\.1"):
            merge(model)
        assert len(lora_layers(model)) == 14
        assert not any(layer.merged for layer in lora_layers(model).values())

    def test_safe_merge_of_a_layer(self):
        model = make_adapted(dtype=torch.float16)
        layer = next(iter(lora_layers(model).values()))
        layer.lora_B.default.weight.data.fill_(1e5)
        layer.lora_A.default.weight.data.fill_(1e3)
        with pytest.raises(ValueError, match=r"NaN or infinity in torch\.float16"):
            layer.merge(safe_merge=True)
        assert not layer.merged

    def test_merge_and_unload_after_merge_adapter(self):
        model = make_adapted()
        model.merge_adapter()
        before = logits(model)
        with pytest.warns(UserWarning, match="already merged"):
            merged = model.merge_and_unload()
        assert torch.equal(logits(merged), before)

    def test_unload_gives_the_4bit_model_back(self):
        base = make_adapted().unload()
        assert torch.equal(logits(base), logits(make_model()))
        assert isinstance(base.get_submodule(QUERY), Linear4bit)

    def test_layers_without_an_adapter_become_dense_too(self):
        model = make_adapted(target_modules=["q_proj"])
        before = logits(model)
        merged = model.merge_and_unload()
        assert not any(isinstance(m, Linear4bit) for m in merged.modules())
        torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)

    def test_a_dense_model_of_peft_is_merged_as_ever(self):
        model = get_peft_model(make_dense(), make_config()).eval()
        randomize(model)
        before = logits(model)
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)

    def test_no_peft_model(self):
        for merge in (merge_dequantized, merge_into_4bit):
            with pytest.raises(TypeError, match="must be a PeftModel, got LlamaFor"):
                merge(make_model())


class TestMergedCheckpoints:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def load(self, folder: Path, **fields: object):
        from qlora_lib.integrations.transformers import QLoRAConfig

        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=QLoRAConfig(**fields)
        )

    @pytest.mark.parametrize("own_function", [True, False])
    def test_saved_and_reloaded_as_an_ordinary_model(self, tmp_path, own_function):
        make_dense(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
        model = get_peft_model(self.load(tmp_path / "base"), make_config())
        randomize(model)
        merged = merge_dequantized(model) if own_function else model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        config = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["dtype"] == "bfloat16"
        reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(logits(reloaded), logits(merged))
        files = load_file(tmp_path / "merged" / "model.safetensors")
        assert files.keys() == make_dense().state_dict().keys()
        assert {tensor.dtype for tensor in files.values()} == {torch.bfloat16}

    def test_merged_into_4_bits_saved_and_reloaded(self, tmp_path):
        make_dense(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
        model = get_peft_model(self.load(tmp_path / "base"), make_config())
        randomize(model)
        merged = merge_into_4bit(model).model
        assert merged.get_submodule(QUERY).weight_dtype == torch.bfloat16
        merged.save_pretrained(tmp_path / "merged")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert isinstance(reloaded.get_submodule(QUERY), Linear4bit)
        assert torch.equal(logits(reloaded), logits(merged))

    @pytest.mark.parametrize("use_dora", [False, True])
    def test_weights_that_are_stored_transposed(self, tmp_path, use_dora):
        # GPT-2 has square ones, whose shape would not tell.
        torch.manual_seed(0)
        config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=50)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
        model = self.load(tmp_path / "base", compute_dtype="float32")
        plain = logits(model.eval())
        lora = make_config(
            target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=use_dora
        )
        model = get_peft_model(model, lora).eval()
        # An adapter begins at zero, and DoRA at the norms of the rows.
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-5)
        randomize(model)
        before = logits(model)
        merged = merge_dequantized(model)
        assert isinstance(merged.transformer.h[0].attn.c_proj, Conv1D)
        torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        reloaded = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(logits(reloaded), logits(merged))


class TestMergeInto4Bits:
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_the_report_is_right(self, double_quant):
        dense = make_dense()
        quantize_linears(dense, FP4, 32, double_quant)
        model = get_peft_model(dense, make_config()).eval()
        randomize(model)
        exact = merge_by_hand(model)
        bases = {
            name.removeprefix(PREFIX): layer.quantized_layer.dequantize().double()
            for name, layer in lora_layers(model).items()
        }
        report = merge_into_4bit(model)
        assert report.layers.keys() == exact.keys()
        errors = weights = updates = 0.0
        for name, weight in exact.items():
            layer = report.model.get_submodule(name)
            assert isinstance(layer, Linear4bit)
            assert layer.codebook is FP4 and layer.block_size == 32
            assert (layer.nested_scales is not None) == double_quant
            assert layer.weight_dtype == torch.float32
            error = (layer.dequantize().double() - weight).norm()
            update = (weight - bases[name]).norm()
            found = report.layers[name]
            assert found.weight == pytest.approx((error / weight.norm()).item(), 1e-4)
            assert found.update == pytest.approx((error / update).item(), 1e-4)
            assert 0.01 < found.weight < 0.3
            errors += error**2
            weights += weight.norm() ** 2
            updates += update**2
        total = report.total
        assert total.weight == pytest.approx((errors / weights).sqrt().item(), 1e-4)
        assert total.update == pytest.approx((errors / updates).sqrt().item(), 1e-4)

    def test_an_update_of_zero_changes_no_code(self):
        dense = make_dense()
        quantize_linears(dense, double_quant=False)
        before = logits(dense)
        report = merge_into_4bit(get_peft_model(dense, make_config()).eval())
        assert report.total.weight == 0 and report.total.update == 0
        assert torch.equal(logits(report.model), before)

    def test_modules_trained_whole_and_other_layers_are_merged_too(self):
        model = make_adapted(
            target_modules=["q_proj", "lm_head"], modules_to_save=["norm"]
        )
        norm = model.get_base_model().model.norm.modules_to_save.default
        norm.weight.data.uniform_(0.5, 2)
        head = model.get_base_model().lm_head
        expected = head.base_layer.weight + head.get_delta_weight("default")
        merged = merge_into_4bit(model).model
        assert torch.equal(merged.model.norm.weight, norm.weight)
        torch.testing.assert_close(merged.lm_head.weight, expected)
        assert isinstance(merged.get_submodule(QUERY), Linear4bit)

    def test_layers_of_an_inactive_adapter_stay_in_4_bits(self):
        model = make_adapted(target_modules=["q_proj"])
        before = logits(model)
        model.add_adapter("second", make_config(target_modules=["v_proj"]))
        randomize(model)
        model.set_adapter("default")
        report = merge_into_4bit(model)
        assert all(name.endswith("q_proj") for name in report.layers)
        layers = [m for m in report.model.modules() if isinstance(m, Linear4bit)]
        assert len(layers) == 14
        assert not lora_layers(report.model)
        assert torch.equal(
            report.model.get_submodule("model.layers.0.self_attn.v_proj").weight,
            make_model().get_submodule("model.layers.0.self_attn.v_proj").weight,
        )
        assert logits(report.model).shape == before.shape

    def test_nothing_to_merge(self):
        model = get_peft_model(make_model(), make_config(target_modules=["lm_head"]))
        with pytest.raises(ValueError, match="no active adapter beside a 4-bit layer"):
            merge_into_4bit(model)


class TestLoftQ:
    def residuals(self, model: PeftModel, dense: nn.Module) -> list[float]:
        return [
            (weight - dense.get_submodule(name).weight).norm().item()
            for name, weight in merge_by_hand(model).items()
        ]

    @pytest.mark.parametrize("iterations", [1, 5])
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_the_weights_come_closer_to_the_original(self, iterations, use_rslora):
        dense = make_dense()
        model = get_peft_model(make_model(), make_config(use_rslora=use_rslora))
        plain = self.residuals(model, dense)
        codes = [layer.quantized_layer.weight for layer in lora_layers(model).values()]
        loftq_init(model, dense.state_dict(), iterations)
        better = self.residuals(model, dense)
        assert all(b < 0.97 * p for p, b in zip(plain, better, strict=True))
        after = [layer.quantized_layer.weight for layer in lora_layers(model).values()]
        same = [torch.equal(*pair) for pair in zip(codes, after, strict=True)]
        assert all(same) if iterations == 1 else not any(same)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 28

    @pytest.mark.parametrize("max_shard_size", ["50GB", "50KB"])
    def test_weights_from_a_folder(self, tmp_path, max_shard_size):
        dense = make_dense()
        dense.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        models = [get_peft_model(make_model(), make_config()) for _ in range(2)]
        loftq_init(models[0], dense.state_dict())
        loftq_init(models[1], tmp_path)
        assert torch.equal(*(logits(model) for model in models))
        assert not torch.equal(logits(models[0]), logits(make_model()))

    def test_it_is_the_best_correction_of_its_rank(self):
        torch.manual_seed(0)
        weight = torch.randn(48, 64)
        q, a, b = loftq_split(weight, NF4, 64, True, rank=6, scaling=0.5)
        rest = weight - q.dequantize()
        error = (rest - 0.5 * b @ a).norm() ** 2
        expected = torch.linalg.svdvals(rest)[6:].square().sum()
        assert error.item() == pytest.approx(expected.item(), 1e-4)
        assert a.shape == (6, 64) and b.shape == (48, 6)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))

    def test_more_iterations_help(self):
        torch.manual_seed(0)
        weight = torch.randn(48, 64)
        errors = []
        for iterations in (1, 2, 5):
            q, a, b = loftq_split(weight, NF4, 64, False, 12, 2.0, iterations)
            errors.append((weight - q.dequantize() - 2.0 * b @ a).norm().item())
        assert errors[2] < errors[0] and errors[1] < errors[0]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop(f"{QUERY}.weight"), f"weights has no {QUERY}.weight"),
            (
                lambda s: s.update({f"{QUERY}.weight": torch.ones(2, 2)}),
                r"q_proj\.weight of torch\.float32 \(2, 2\).*\(64, 64\)",
            ),
            (
                lambda s: s.update(make_dense(5).state_dict()),
                "farther from the model's than zero",
            ),
        ],
    )
    def test_weights_of_another_model_change_nothing(self, change, message):
        state = dict(make_dense().state_dict())
        change(state)
        model = make_adapted()
        before = logits(model)
        with pytest.raises(ValueError, match=message):
            loftq_init(model, state)
        assert torch.equal(logits(model), before)

    def test_a_rank_that_is_too_large_for_one_layer_changes_nothing(self):
        model = make_adapted(r=40)  # k_proj has 32 rows
        before = logits(model)
        with pytest.raises(ValueError, match=r"rank 40 at \S+k_proj.*\(32, 64\)"):
            loftq_init(model, make_dense().state_dict())
        assert torch.equal(logits(model), before)

    def test_several_active_adapters(self):
        model = make_adapted()
        model.add_adapter("second", make_config())
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match=r"one active adapter, got \['default', '"):
            loftq_init(model, make_dense().state_dict())

    @pytest.mark.parametrize("iterations", [1, 2])
    def test_dora_begins_at_the_corrected_weight(self, iterations):
        model = make_adapted(use_dora=True)
        loftq_init(model, make_dense().state_dict(), iterations)
        for layer in lora_layers(model).values():
            a, b = layer.matrices("default")
            start = (
                layer.quantized_layer.dequantize() + layer.scaling["default"] * b @ a
            )
            torch.testing.assert_close(layer.dense_weight(["default"]), start)

    def test_a_model_that_is_not_in_4_bits(self):
        model = get_peft_model(make_dense(), make_config())
        with pytest.raises(ValueError, match="no 4-bit layer with adapter default"):
            loftq_init(model, make_dense().state_dict())

    def test_a_model_without_adapters(self):
        with pytest.raises(TypeError, match="must be a PeftModel, got LlamaFor"):
            loftq_init(make_model(), make_dense().state_dict())

    def test_a_folder_without_weights(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors"):
            loftq_init(make_adapted(), tmp_path)

    def test_numbers_out_of_range(self):
        weight = torch.randn(4, 8)
        with pytest.raises(ValueError, match="rank must be between 1 and 4.* got 5"):
            loftq_split(weight, NF4, 64, True, 5, 1.0)
        with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
            loftq_split(weight, NF4, 64, True, 2, 1.0, 0)
        for scaling in (0.0, -1.0):
            with pytest.raises(ValueError, match="scaling must be above 0, got"):
                loftq_split(weight, NF4, 64, True, 2, scaling)
        model = make_adapted()
        before = logits(model)
        with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
            loftq_init(model, make_dense().state_dict(), 0)
        assert torch.equal(logits(model), before)


class TestPrepareForKbitTraining:
    def test_codes_and_scales_stay_and_the_model_trains_and_merges(self):
        model = make_model(dtype=torch.bfloat16)
        codes = model.get_submodule(QUERY).quantized_weight.dequantize()
        model = prepare_model_for_kbit_training(model)
        assert model.model.norm.weight.dtype == torch.float32
        layer = model.get_submodule(QUERY)
        assert torch.equal(layer.quantized_weight.dequantize(), codes)
        model = get_peft_model(model, make_config()).train()
        randomize(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.merge_adapter()
        logits(model)
        model.unmerge_adapter()
        before = logits(model.eval())
        merged = merge_dequantized(model)
        assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(logits(merged).float(), before, rtol=0, atol=0.02)
