"""Models of transformers that are quantized while they are loaded."""

import gc
import json
import logging
import os
import subprocess
import sys
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    FalconConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
    T5Config,
    Trainer,
    TrainingArguments,
)

from qlora_lib.integrations.transformers import FORMAT_VERSION, QLoRAConfig
from qlora_lib.integrations.transformers.quantizer import QLoRAQuantizer
from qlora_lib.kernels.ops import quantize
from qlora_lib.nn import Linear4bit, quantize_linears
from qlora_lib.numerics import NF4, codebook_by_name

from .conftest import GPT2, SMALL


def linears(model) -> dict[str, Linear4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}


def assert_same_layer(found: Linear4bit, expected: Linear4bit) -> None:
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert found.weight_dtype == expected.weight_dtype
    assert found.block_size == expected.block_size
    assert found.codebook == expected.codebook


class TestConfig:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"codebook": "nf3", "block_size": None, "double_quant": False},
            {"compute_dtype": torch.float16, "skip_modules": ("a", "b")},
        ],
    )
    def test_is_the_same_after_json(self, options):
        config = QLoRAConfig(**options)
        written = json.loads(json.dumps(config.to_dict()))
        assert QLoRAConfig.from_dict(written).to_dict() == written
        assert written["quant_method"] == "qlora_lib"
        assert written["format_version"] == FORMAT_VERSION

    def test_defaults_are_those_of_the_paper(self):
        config = QLoRAConfig().to_dict()
        assert config["codebook"] == "nf4"
        assert config["block_size"] == 64
        assert config["double_quant"] is True
        assert config["compute_dtype"] == "bfloat16"

    @pytest.mark.parametrize(
        ("option", "error", "message"),
        [
            ({"codebook": "nf9"}, ValueError, "got 'nf9': use one of .*nf4"),
            ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
            ({"block_size": 64.0}, TypeError, "block_size must be an integer"),
            ({"block_size": True}, TypeError, "block_size must be an integer"),
            ({"double_quant": "no"}, TypeError, "double_quant must be True or False"),
            ({"compute_dtype": "int8"}, ValueError, "compute_dtype must be one of"),
            ({"skip_modules": "lm_head"}, TypeError, r"pass \['lm_head'\]"),
            ({"blocksize": 64}, TypeError, "blocksize"),
            ({"quant_method": "gptq"}, ValueError, "got 'gptq'"),
            ({"format_version": FORMAT_VERSION + 1}, ValueError, "upgrade"),
        ],
    )
    def test_refuses(self, option, error, message):
        with pytest.raises(error, match=message):
            QLoRAConfig(**option)

    @pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None])
    def test_another_format_version_asks_for_an_upgrade(self, version):
        written = QLoRAConfig().to_dict() | {"format_version": version, "new": 1}
        with pytest.raises(ValueError, match=f"{version!r}.*upgrade"):
            QLoRAConfig.from_dict(written)

    def test_unknown_fields_are_refused_by_name(self):
        with pytest.raises(ValueError, match=r"unknown \['new'\]"):
            QLoRAConfig.from_dict(QLoRAConfig().to_dict() | {"new": 1})


class TestQuantizing:
    @pytest.mark.parametrize(
        ("codebook", "block_size", "double_quant", "compute_dtype"),
        [
            ("nf4", 64, True, "bfloat16"),
            ("nf4", 64, False, "float32"),
            ("fp4_e2m1", 32, True, "float16"),
            ("int3", 48, True, "bfloat16"),
            ("nf8", None, False, "bfloat16"),
        ],
    )
    def test_every_layer_is_what_from_linear_makes(
        self, load, llama_folder, codebook, block_size, double_quant, compute_dtype
    ):
        dtype = getattr(torch, compute_dtype)
        dense = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype)
        model = load(
            llama_folder,
            codebook=codebook,
            block_size=block_size,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
        )
        expected = {
            name: Linear4bit.from_linear(
                module, codebook_by_name(codebook), block_size, double_quant
            )
            for name, module in dense.named_modules()
            if type(module) is nn.Linear and name != "lm_head"
        }
        assert linears(model).keys() == expected.keys()
        assert len(expected) == 14
        for name, layer in linears(model).items():
            assert_same_layer(layer, expected[name])
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                assert parameter.dtype == dtype, name
                assert torch.equal(parameter, dense.get_parameter(name)), name

    def test_computes_as_a_model_quantized_in_place(self, load, base_folder, tokens):
        dense = AutoModelForCausalLM.from_pretrained(base_folder)
        with torch.no_grad():
            exact = dense(tokens).logits
            quantize_linears(dense)
            expected = dense(tokens).logits
            found = load(base_folder)(tokens).logits
        assert torch.equal(found, expected)
        assert not torch.equal(found, exact)

    def test_tied_output_layer_stays_tied_and_dense(self, load, base_folder):
        model = load(base_folder)
        assert type(model.lm_head) is nn.Linear
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == torch.bfloat16

    def test_base_model_alone_and_a_new_head(self, load, llama_folder):
        whole = load(llama_folder)
        base = load(llama_folder, AutoModel)
        classifier = load(llama_folder, AutoModelForSequenceClassification)
        assert type(classifier.score) is nn.Linear
        for name, layer in linears(whole).items():
            inner = name.removeprefix("model.")
            assert_same_layer(base.get_submodule(inner), layer)
            assert_same_layer(classifier.get_submodule(name), layer)

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, None])
    @pytest.mark.skipif(torch.cuda.is_available(), reason="auto would choose the GPU")
    def test_device_maps(self, llama_folder, device_map):
        model = AutoModelForCausalLM.from_pretrained(
            llama_folder, quantization_config=QLoRAConfig(), device_map=device_map
        )
        assert {p.device.type for p in model.parameters()} == {"cpu"}

    @pytest.mark.parametrize(
        "device_map", [{"": "disk"}, {"model": 0, "lm_head": "cpu"}]
    )
    def test_offloading_is_refused(self, llama_folder, device_map):
        with pytest.raises(ValueError, match="not offloaded: pass device_map='cpu'"):
            AutoModelForCausalLM.from_pretrained(
                llama_folder, quantization_config=QLoRAConfig(), device_map=device_map
            )

    @pytest.mark.parametrize("stored", [torch.float32, torch.float16])
    def test_a_cast_is_told(self, save_random, load, caplog, stored):
        folder = save_random(dtype=stored)
        model = load(folder)
        assert model.dtype == torch.bfloat16
        (record,) = [r for r in caplog.records if r.name.startswith("qlora_lib")]
        assert record.levelno == logging.WARNING
        assert f"dtype is {stored}" in record.message
        assert "QLoRAConfig(compute_dtype=...)" in record.message

    def test_a_conflicting_dtype_argument_is_told(self, llama_folder, caplog):
        AutoModelForCausalLM.from_pretrained(
            llama_folder, quantization_config=QLoRAConfig(), dtype=torch.float32
        )
        assert "dtype is torch.float32, as asked for" in caplog.text

    def test_without_a_cast_nothing_is_told(self, load, llama_folder, caplog):
        load(llama_folder)
        assert not [r for r in caplog.records if r.name.startswith("qlora_lib")]

    def test_the_base_is_frozen_bytes_and_biases_are_frozen(self, load, llama_folder):
        for layer in linears(load(llama_folder)).values():
            for name, parameter in layer.named_parameters():
                assert not parameter.requires_grad, name
                assert name == "bias" or parameter.dtype == torch.uint8

    def test_sizes(self, load, base_folder):
        model = load(base_folder)
        stored = sum(p.nbytes for p in model.parameters())
        buffers = sum(b.nbytes for b in model.buffers())
        assert model.get_memory_footprint() == stored + buffers
        layers = linears(model).values()
        weights = sum(layer.quantized_weight.shape.numel() for layer in layers)
        packed = sum(layer.quantized_weight.nbytes for layer in layers)
        assert weights == 6 * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512)
        assert 4 < 8 * packed / weights < 4.2
        assert model.is_quantized
        assert "codebook=nf4, block_size=64, double_quant=True" in str(model)
        # As many as are stored: two codes are one number.
        assert model.num_parameters() == sum(p.numel() for p in model.parameters())

    def test_sizes_are_foreseen(self, llama_folder, load):
        """What is reserved on a GPU before the weights come is what they take."""
        quantizer = QLoRAQuantizer(QLoRAConfig(), pre_quantized=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                LlamaConfig(**SMALL, attention_bias=True), dtype=torch.bfloat16
            )
        quantizer.preprocess_model(model, dtype=torch.bfloat16, device_map=None)
        foreseen = sum(
            parameter.numel() * quantizer.param_element_size(model, name, parameter)
            for name, parameter in model.named_parameters()
        )
        loaded = load(llama_folder)
        assert foreseen == sum(p.nbytes for p in loaded.parameters())


class TestChoosingLayers:
    @pytest.mark.parametrize(
        ("skipped", "left"),
        [
            ("down_proj", {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}),
            ("model.layers.0.mlp.down_proj", {"model.layers.0.mlp.down_proj"}),
            (
                "layers.1.mlp",
                {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")},
            ),
        ],
    )
    def test_skip_modules(self, load, llama_folder, skipped, left):
        everything = linears(load(llama_folder)).keys()
        model = load(llama_folder, skip_modules=[skipped])
        assert everything - linears(model).keys() == left
        for name in left:
            assert type(model.get_submodule(name)) is nn.Linear

    @pytest.mark.parametrize("skipped", ["proj", "down", "layers.2", "downproj", ""])
    def test_a_name_that_is_not_there_is_refused(self, load, llama_folder, skipped):
        with pytest.raises(ValueError, match=f"has {skipped!r}, but LlamaForCausalLM"):
            load(llama_folder, skip_modules=[skipped])

    def test_nothing_to_quantize(self, load, llama_folder):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no linear layer"):
            load(llama_folder, skip_modules=["self_attn", "mlp"])

    @pytest.mark.parametrize(
        "config",
        [
            MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
            Qwen3MoeConfig(
                **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
            ),
            OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
        ],
        ids=lambda config: config.model_type,
    )
    def test_fused_experts_are_refused_by_name(self, save_random, load, tokens, config):
        folder = save_random(config)
        cure = r"layers.0.mlp.experts.gate_up_proj.*skip_modules=\['experts'\]"
        with pytest.raises(ValueError, match=cure):
            load(folder, AutoModelForCausalLM)
        model = load(folder, skip_modules=["experts"])
        assert len(linears(model)) == 8  # the attention of two layers
        assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
        dense = AutoModelForCausalLM.from_pretrained(folder)
        for name, parameter in model.named_parameters():
            if "experts" in name:
                assert torch.equal(parameter, dense.get_parameter(name))
        assert torch.isfinite(model(tokens).logits).all()

    def test_subclasses_of_linear_layers_are_refused_by_name(self, save_random, load):
        sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1}
        folder = save_random(FalconConfig(**sizes, num_attention_heads=2))
        with pytest.raises(ValueError, match=r"h.0.self_attention.query_key_value"):
            load(folder)

    def test_transposed_layers_of_gpt2_are_quantized(self, save_random, load, tokens):
        folder = save_random(GPT2)
        dense = AutoModelForCausalLM.from_pretrained(folder)
        model = load(folder)
        assert len(linears(model)) == 4
        for name, layer in linears(model).items():
            transposed = dense.get_submodule(name)  # c_proj is square
            expected = quantize(transposed.weight.T, NF4, 64, double_quant=True)
            assert_same_layer(layer, Linear4bit(expected, transposed.bias))
        found, exact = load(folder, codebook="int8")(tokens).logits, dense(tokens)
        assert (found - exact.logits).norm() < 0.02 * exact.logits.norm()

    def test_what_a_class_keeps_in_float32_is_left(self, save_random, load, tokens):
        sizes = {"d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 32}
        config = T5Config(vocab_size=64, **sizes, decoder_start_token_id=0)
        folder = save_random(config, model_class=AutoModelForSeq2SeqLM.from_config)
        model = load(folder, AutoModelForSeq2SeqLM)
        dense = {n for n, m in model.named_modules() if type(m) is nn.Linear}
        assert {name.rpartition(".")[2] for name in dense} == {"wo", "lm_head"}
        output = model(input_ids=tokens, decoder_input_ids=tokens)
        assert torch.isfinite(output.logits).all()


@pytest.fixture(scope="module")
def large_folder(save_random):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    # Stored as float32, so that each weight is copied when it is cast.
    return save_random(LlamaConfig(**SMALL | sizes), torch.float32)


class TestMemory:
    """The peak of loading: the quantized model and one weight."""

    LARGEST = 512 * 2048

    def test_allocated_bytes(self, load, large_folder):
        _, workspace = peak_bytes(
            lambda: quantize(torch.randn(512, 2048), NF4, 64, True)
        )
        file_size = (large_folder / "model.safetensors").stat().st_size
        model, peak = peak_bytes(
            lambda: load(large_folder), ignore_above=file_size // 2
        )
        one_weight = 2 * self.LARGEST
        final = model.get_memory_footprint()
        weights = sum(m.in_features * m.out_features for m in linears(model).values())
        # The bound can fail: the dense weights would be far above it.
        assert final + one_weight + workspace < 2 * weights
        assert final < peak <= final + one_weight + workspace

    def test_one_dense_weight_lives_at_a_time(self, load, large_folder, monkeypatch):
        living: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        most = []

        def watched(tensor, *options):
            living.add(tensor)
            gc.collect(0)
            most.append(len(living))
            return quantize(tensor, *options)

        monkeypatch.setattr(
            "qlora_lib.integrations.transformers.quantizer.quantize", watched
        )
        load(large_folder)
        assert len(most) == 42
        assert max(most) == 1

    @pytest.mark.gpu
    def test_allocated_bytes_on_a_gpu(self, large_folder):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = AutoModelForCausalLM.from_pretrained(
            large_folder, quantization_config=QLoRAConfig()
        )
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        peak = torch.cuda.max_memory_allocated() - before
        # The file's float32 may be there beside the cast weight; scales of one weight
        # before and after their quantization are in the last term.
        one_weight = (4 + 2) * self.LARGEST
        final = torch.cuda.memory_allocated() - before
        assert peak <= final + one_weight + 16 * self.LARGEST // 64 + 2**20

    @pytest.mark.gpu
    def test_a_gpu_quantizes_to_the_same_bits(self, large_folder, load):
        on_gpu = AutoModelForCausalLM.from_pretrained(
            large_folder, quantization_config=QLoRAConfig(double_quant=False)
        )
        on_cpu = load(large_folder, double_quant=False)
        for name, tensor in on_cpu.state_dict().items():
            assert torch.equal(on_gpu.state_dict()[name].cpu(), tensor), name


def peak_bytes(work, ignore_above=None):
    """What the CPU allocator held at most while ``work()`` ran, and its result.

    Larger single allocations are ignored: the file that safetensors maps is one.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        if ignore_above is None or abs(event.nbytes()) < ignore_above:
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 0
    return result, peak


class TestDamagedWeights:
    def test_a_missing_weight_is_named(self, llama_folder, load, edit_copy):
        name = "model.layers.1.mlp.up_proj.weight"
        folder = edit_copy(llama_folder, lambda tensors: tensors.pop(name))
        with pytest.raises(ValueError, match=f"not complete, it has no {name}"):
            load(folder)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_number_that_is_not_finite_is_named(
        self, llama_folder, load, edit_copy, bad
    ):
        name = "model.layers.1.mlp.up_proj.weight"
        folder = edit_copy(llama_folder, lambda t: t[name].view(-1)[7:8].fill_(bad))
        with pytest.raises(ValueError, match=f"{name}: tensor holds {bad} at .* 7"):
            load(folder)


# The name of 5.17, which 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
class TestTraining:
    @pytest.fixture
    def adapted(self, load, base_folder):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear")
        return get_peft_model(load(base_folder), config)

    def test_importing_nothing_but_transformers_is_enough_for_peft(self, adapted):
        kinds = {
            type(module).__name__
            for module in adapted.modules()
            if hasattr(module, "lora_A")
        }
        assert kinds == {"LoraLinear4bit"}

    def test_the_trainer_trains_the_adapters_alone(self, adapted, tokens, tmp_path):
        before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=8,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        row = {"input_ids": tokens[0], "labels": tokens[0]}
        trainer = Trainer(model=adapted, args=arguments, train_dataset=[row] * 16)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert losses[-1] < 0.5 * losses[0]
        changed = {
            name
            for name, parameter in adapted.named_parameters()
            if not torch.equal(parameter.cpu(), before[name])
        }
        assert changed == {name for name in before if "lora_" in name}

    def test_gradient_checkpointing_changes_no_gradient(self, adapted, tokens):
        def gradients():
            adapted.zero_grad()
            adapted(input_ids=tokens, labels=tokens).loss.backward()
            named = adapted.named_parameters()
            return {n: p.grad.clone() for n, p in named if p.grad is not None}

        adapted.train()
        expected = gradients()
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
        found = gradients()
        assert found.keys() == expected.keys() != set()
        assert all(torch.equal(found[name], expected[name]) for name in found)


WITHOUT_BITSANDBYTES = """
import sys
sys.modules["bitsandbytes"] = None  # importing it is an error
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from qlora_lib.integrations.transformers import QLoRAConfig, save_bitsandbytes

model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=QLoRAConfig(), device_map="cpu"
)
print(model.num_parameters(), model.get_memory_footprint())
save_bitsandbytes(model, sys.argv[2])
adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
adapted.print_trainable_parameters()
tokens = torch.arange(8)[None]
adapted(input_ids=tokens, labels=tokens).loss.backward()
"""


def test_bitsandbytes_is_not_needed(base_folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_BITSANDBYTES, base_folder, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").exists()
