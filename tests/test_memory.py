"""Estimates of memory against real steps, real optimizers and counts by hand."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

import qlora_lib.integrations.peft  # noqa: F401 - tells peft about Linear4bit
from qlora_lib import FP4, NF4, TOY
from qlora_lib.integrations.transformers import enable_gradient_checkpointing
from qlora_lib.integrations.transformers.layers import linear_layers
from qlora_lib.memory import estimate, estimate_memory, llama_config
from qlora_lib.memory.estimate import CUBLAS_WORKSPACES, GIB
from qlora_lib.memory.optimizers import OPTIMIZERS, OptimizerBytes
from qlora_lib.memory.planned_model import planned_model
from qlora_lib.memory.rehearsal import rehearse
from qlora_lib.nn import Linear4bit, quantize_linears
from qlora_lib.optim import PagedAdamW

PLAN = {
    "weights": "4bit",
    "trained": "adapters",
    "rank": 4,
    "codebook": NF4,
    "block_size": 64,
    "double_quant": True,
}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def small_config(kind=LlamaConfig, **changes):
    return kind(**{**SMALL, "num_key_value_heads": 4, **changes})


def real_model(config, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    quantize_linears(model, **options)
    return model


def with_adapters(model, rank=4):
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


WIDTHS = [
    small_config(),
    small_config(hidden_size=192, num_key_value_heads=2),
    small_config(intermediate_size=704, num_hidden_layers=5, vocab_size=1024),
    small_config(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    small_config(Qwen2Config),
    small_config(Qwen3Config, head_dim=32),
]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("config", WIDTHS, ids=lambda c: f"{c.model_type}")
def test_meta_step_takes_what_a_real_step_takes(config, checkpointing):
    real = rehearse(with_adapters(real_model(config)), 2, 96, checkpointing)
    planned = rehearse(planned_model(config, **PLAN), 2, 96, checkpointing)
    for phase in ("forward", "backward"):
        expected = real.peaks[phase].total()
        assert planned.peaks[phase].total() == pytest.approx(expected, rel=0.01)
    for part in ("gradients", "logits", "checkpoints", "workspace"):
        assert planned.largest[part] == real.largest[part], part


@pytest.mark.parametrize("config", WIDTHS, ids=lambda c: f"{c.model_type}")
def test_kept_for_backward_is_what_autograd_says_it_saves(config):
    model = with_adapters(real_model(config))
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    saved = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # The storage is held, so that no later one gets its address.
            saved[storage._cdata] = storage
        return tensor

    tokens = torch.zeros(2, 96, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens).loss
    by_autograd = sum(storage.nbytes() for storage in saved.values())
    del loss

    planned = rehearse(planned_model(config, **PLAN), 2, 96, False)
    assert planned.kept.total() == pytest.approx(by_autograd, rel=0.005)


# PyTorch 2.11 says so of every profile.
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_step_in_16_bits_takes_what_the_profiler_sees():
    config = small_config(num_hidden_layers=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    tokens = torch.zeros(2, 256, dtype=torch.long)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        model(input_ids=tokens, labels=tokens).loss.backward()
    changes = [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)

    plan = {**PLAN, "weights": "16bit", "trained": "all"}
    planned = rehearse(planned_model(config, **plan), 2, 256, False)
    found = max(parts.total() for parts in planned.peaks.values())
    assert found == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 48, None])
@pytest.mark.parametrize("codebook", [NF4, FP4, TOY])
def test_parts_of_the_model_are_those_of_the_real_one(
    codebook, block_size, double_quant
):
    options = {
        "codebook": codebook,
        "block_size": block_size,
        "double_quant": double_quant,
    }
    config = small_config(num_hidden_layers=1, attention_bias=True)
    model = real_model(config, **options)
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    parts = estimate_memory(config, rank=4, sequence_length=8, **options).at_peak
    assert parts.weights + parts.scales + parts.sixteen_bit == total
    linears = [m for m in model.modules() if hasattr(m, "quantized_weight")]
    assert parts.weights == sum(m.weight.nbytes for m in linears)
    assert parts.scales == sum(
        m.quantized_weight.nbytes - m.weight.nbytes for m in linears
    )


def test_adapters_gradients_and_state_by_hand():
    config = small_config()
    found = estimate_memory(config, rank=8, optimizer="adamw_torch_fused")
    hidden, intermediate = 128, 320
    per_layer = 8 * (4 * 2 * hidden + 3 * (hidden + intermediate))
    parameters = 3 * per_layer
    assert found.largest.adapters == 4 * parameters
    assert found.largest.gradients == 4 * parameters
    assert found.largest.optimizer_state == 8 * parameters
    assert found.paged_state == 0


def test_checkpoints_are_one_hidden_state_a_layer():
    found = estimate_memory(small_config(), batch_size=2, sequence_length=96, rank=4)
    assert found.largest.checkpoints == 3 * 2 * 96 * 128 * 2
    without = estimate_memory(
        small_config(),
        batch_size=2,
        sequence_length=96,
        rank=4,
        gradient_checkpointing=False,
    )
    assert without.largest.checkpoints == 0
    assert without.largest.activations > 2 * found.largest.activations


def test_accumulated_gradients_are_there_in_the_forward_pass():
    run = {"rank": 64, "sequence_length": 16, "optimizer": "adamw_torch_fused"}
    once, twice, often = (
        estimate_memory(small_config(), **run, gradient_accumulation=count)
        for count in (1, 2, 16)
    )
    assert once.phases["forward"].gradients == 0
    assert twice.phases["forward"].gradients == twice.largest.adapters
    assert twice.phases["optimizer"] == once.phases["optimizer"]
    assert often == twice


def test_workspace_is_the_largest_weight_in_16_bits():
    found = estimate_memory(
        small_config(), rank=4, sequence_length=32, optimizer="adamw_torch_fused"
    )
    assert found.largest.workspace == CUBLAS_WORKSPACES + 128 * 320 * 2


def test_tied_embeddings_are_counted_once():
    apart, tied = (
        estimate_memory(small_config(tie_word_embeddings=tied), sequence_length=8)
        for tied in (False, True)
    )
    difference = apart.largest.sixteen_bit - tied.largest.sixteen_bit
    assert difference == 512 * 128 * 2


def test_fused_experts_stay_in_16_bits():
    config = small_config(MixtralConfig, num_local_experts=4)
    found = estimate_memory(config, rank=4, sequence_length=32)
    experts = 3 * 4 * 3 * 128 * 320 * 2
    assert experts < found.largest.sixteen_bit < 1.5 * experts
    attention = 3 * 4 * 128 * 128
    assert found.largest.weights == attention // 2


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch"])
def test_state_of_torch_optimizers_is_what_they_hold(optimizer):
    parameter = nn.Parameter(torch.zeros(300, 70))
    parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.AdamW([parameter], fused=optimizer == "adamw_torch_fused")
    adam.step()
    held = adam.state[parameter]
    state = sum(held[name].nbytes for name in ("exp_avg", "exp_avg_sq"))
    found = OPTIMIZERS[optimizer]([parameter])
    assert (found.state, found.paged_state) == (state, 0)
    assert found.step == (parameter.nbytes if optimizer == "adamw_torch" else 0)


@pytest.mark.parametrize("count", [100, 4095, 4096, 5000, 200_000])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw_8bit", "AdamW8bit"),
        ("paged_adamw_8bit", "PagedAdamW8bit"),
        ("paged_adamw_32bit", "PagedAdamW32bit"),
    ],
)
# What is asked here is the size of its state, which is the same on a CPU.
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_state_of_bitsandbytes_is_what_it_holds(name, kind, count):
    import bitsandbytes as bnb

    parameter = nn.Parameter(torch.zeros(count))
    parameter.grad = torch.ones_like(parameter)
    adam = getattr(bnb.optim, kind)([parameter])
    adam.step()
    held = adam.state[parameter]
    names = ("state1", "state2", "absmax1", "absmax2")
    state = sum(held[name].nbytes for name in names if name in held)
    paged = name.startswith("paged") and count >= 100_000
    expected = OptimizerBytes(paged_state=state) if paged else OptimizerBytes(state)
    assert OPTIMIZERS[name]([parameter]) == expected


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("layers", [1, 9])
def test_state_of_the_library_is_what_it_holds(bits, layers):
    # 9 layers have more state than the four pages that a step takes.
    wide = {"hidden_size": 640, "intermediate_size": 2000, "num_hidden_layers": layers}
    config = small_config(**wide)
    name = f"qlora_paged_adamw_{bits}bit"
    found = estimate_memory(config, rank=512, sequence_length=8, optimizer=name)
    counts = [512 * width for width in (640,) * 8 + (640, 2000) * 3] * layers
    parameters = [nn.Parameter(torch.zeros(count)) for count in counts]
    for parameter in parameters:
        parameter.grad = parameter.detach()
    adam = PagedAdamW(parameters, state_bits=bits)
    adam.step()
    held = sum(
        tensor.nbytes
        for state in adam.state_dict()["state"].values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    )
    # By hand: every tensor begins a program of 2048 numbers, and pages are whole.
    programs = sum(-(-count // 2048) for count in counts)
    size = 2048 * 8 if bits == 32 else 2048 * 2 + 2048 // 256 * 2 * 4
    per_page = min(programs, 2**24 // size)
    pages = -(-programs // per_page)
    assert found.paged_state == adam.state_bytes == pages * per_page * size >= held
    assert found.largest.optimizer_state == 0
    staged = min(4, pages) * per_page * size
    assert (staged < found.paged_state) == (layers == 9)
    without = estimate_memory(
        config, rank=512, sequence_length=8, optimizer="adamw_torch_fused"
    )
    phases = without.phases
    more = found.phases["optimizer"].workspace - phases["optimizer"].workspace
    assert more == staged
    assert found.phases["forward"] == dataclasses.replace(
        phases["forward"], optimizer_state=0
    )


def test_small_tensors_are_not_paged_by_bitsandbytes():
    paged = estimate_memory(
        small_config(hidden_size=512, intermediate_size=12_500),
        rank=8,
        optimizer="paged_adamw_32bit",
    )
    # 8 x 12500 is paged, 8 x 512 is not.
    assert paged.paged_state == 8 * 3 * 3 * 8 * 12_500
    assert paged.largest.optimizer_state == 8 * 3 * 8 * (4 * 2 + 3) * 512


def test_full_fine_tuning_of_65b_takes_the_780_gb_of_the_paper():
    found = estimate_memory(
        "llama-65b", weights="16bit", trained="all", optimizer="adamw_torch_fused"
    )
    parts = found.largest
    trained = parts.weights + parts.sixteen_bit
    assert parts.gradients == pytest.approx(trained, rel=1e-3)
    assert parts.optimizer_state == pytest.approx(4 * trained, rel=1e-3)
    by_parameter = trained + parts.gradients + parts.optimizer_state
    assert 780e9 < by_parameter < 790e9


def test_qlora_of_65b_fits_48_gb():
    found = estimate_memory("llama-65b", device_gib=48e9 / GIB)
    assert found.fits
    assert found.peak < 40 * GIB
    assert found.suggestions == ()


def test_parts_add_up_and_the_peak_is_the_largest_phase():
    found = estimate_memory(small_config(), rank=4)
    assert set(found.phases) == {"forward", "backward", "optimizer"}
    assert found.peak == max(parts.total for parts in found.phases.values())
    assert found.at_peak == found.phases[found.peak_phase]
    assert found.peak < found.largest.total
    assert found.fits is None


def test_a_model_is_estimated_as_its_configuration():
    config = small_config(num_key_value_heads=2)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    expected = estimate_memory(config, rank=4)
    assert estimate_memory(dense, rank=4) == expected
    assert estimate_memory(real_model(config), rank=4) == expected


def test_layers_of_a_model_are_taken_as_they_are():
    config = small_config()
    model = real_model(config, skip=("lm_head", "down_proj"), block_size=32)
    found = estimate_memory(model, rank=4).largest
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert found.weights + found.scales + found.sixteen_bit == total
    with pytest.raises(ValueError, match="has adapters already"):
        estimate_memory(with_adapters(model))


def test_configuration_and_model_are_left_as_they_were():
    config = small_config()
    before = config.to_dict()
    estimate_memory(config, rank=4)
    assert config.to_dict() == before
    attention = nn.functional.scaled_dot_product_attention
    assert attention.__name__ == "scaled_dot_product_attention"


def test_each_suggestion_fits():
    run = {
        "batch_size": 4,
        "sequence_length": 1024,
        "rank": 16,
        "optimizer": "adamw_torch_fused",
        "gradient_checkpointing": False,
    }
    config = small_config(num_hidden_layers=8)
    needed = estimate_memory(config, **run).on_card
    device = (needed - 100 * 2**20) / GIB
    found = estimate_memory(config, **run, device_gib=device)
    assert not found.fits
    names = [next(iter(s)) for s in found.suggestions]
    assert names[0] == "gradient_checkpointing"
    assert {"batch_size", "sequence_length"} <= set(names)
    for suggestion in found.suggestions:
        changed = {**run, **suggestion}
        assert estimate_memory(config, **changed, device_gib=device).fits, suggestion


# To page the state of the second one in 32 bits would save nothing.
@pytest.mark.parametrize("bits", [32, 8])
def test_changes_are_combined_where_one_is_not_enough(bits):
    run = {"batch_size": 4, "sequence_length": 512, "rank": 16}
    run["optimizer"] = f"qlora_paged_adamw_{bits}bit"
    config = small_config(vocab_size=8192)
    least = {**run, "batch_size": 1, "sequence_length": 256}
    device = (estimate_memory(config, **least).on_card + 1000) / GIB
    found = estimate_memory(config, **run, device_gib=device)
    assert not found.fits
    assert found.suggestions == ({"batch_size": 1, "sequence_length": 256},)


def test_nothing_is_suggested_where_the_weights_alone_are_too_large(monkeypatch):
    monkeypatch.setattr(estimate, "_levers", lambda run: pytest.fail("not needed"))
    found = estimate_memory(small_config(), device_gib=0.001)
    assert found.fits is False
    assert found.suggestions == ()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config_or_model": "gpt-5"}, ValueError, "llama-7b.*got 'gpt-5'"),
        ({"config_or_model": 7}, TypeError, "got int"),
        ({"batch_size": 0}, ValueError, "batch_size .* got 0"),
        ({"sequence_length": 2.5}, ValueError, "sequence_length .* got 2.5"),
        ({"gradient_accumulation": 0}, ValueError, "gradient_accumulation .* got 0"),
        ({"rank": -1}, ValueError, "rank .* got -1"),
        ({"optimizer": "sgd"}, ValueError, "optimizer must be one of .* got 'sgd'"),
        ({"weights": "8bit"}, ValueError, "weights must be one of .* got '8bit'"),
        ({"trained": "none"}, ValueError, "trained must be one of .* got 'none'"),
        ({"trained": "all"}, ValueError, "needs weights='16bit'"),
        ({"device_gib": 0}, ValueError, "device_gib .* got 0"),
        ({"device_gib": float("nan")}, ValueError, "device_gib .* got nan"),
        ({"device_gib": float("inf")}, ValueError, "device_gib .* got inf"),
        ({"codebook": "nf4"}, TypeError, "codebook must be a Codebook.* got 'nf4'"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": 6.4}, TypeError, "block_size must be an integer .* got 6.4"),
        (
            {"config_or_model": LlamaConfig(num_hidden_layers=0)},
            ValueError,
            "no linear",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        estimate_memory(**{"config_or_model": small_config(), **arguments})


def test_shapes_are_those_of_the_paper():
    billions = {"7b": 6.7, "13b": 13.0, "33b": 32.5, "65b": 65.3}
    for size, expected in billions.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(llama_config(f"llama-{size}"))
        assert model.num_parameters() / 1e9 == pytest.approx(expected, abs=0.1)


def test_import_leaves_transformers_alone():
    code = (
        "import sys, qlora_lib.memory\n"
        "sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("sequence_length", [512, 2048])
def test_peak_is_that_of_the_gpu(sequence_length, checkpointing):
    config = small_config(
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
    )
    found = estimate_memory(
        config,
        sequence_length=sequence_length,
        gradient_checkpointing=checkpointing,
        optimizer="adamw_torch_fused",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    quantize_linears(model)
    model = with_adapters(model, rank=64).train()
    if checkpointing:
        enable_gradient_checkpointing(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, fused=True)
    tokens = torch.zeros(1, sequence_length, dtype=torch.long, device="cuda")
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.3)
        adam.step()
        adam.zero_grad()
        del loss
    assert found.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.05)


def test_layers_are_those_that_the_loader_quantizes():
    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=128)
    planned = planned_model(config, **PLAN)
    with torch.device("meta"):
        names = linear_layers(AutoModelForCausalLM.from_config(config), ())
    found = {n for n, m in planned.named_modules() if isinstance(m, Linear4bit)}
    assert len(found) == len(names) == 2 * 4
    # Two codes a byte: attention and projection, up and down.
    assert estimate_memory(config).largest.weights == 2 * 64 * 64 * (3 + 1 + 4 + 4) // 2


def test_the_optimizer_of_the_library_is_suggested_where_state_is_what_is_too_much():
    run = {"rank": 512, "sequence_length": 8, "optimizer": "adamw_torch_fused"}
    config = small_config(hidden_size=640, intermediate_size=2000, num_hidden_layers=9)
    needed = estimate_memory(config, **run)
    device = (needed.on_card - needed.largest.optimizer_state // 2) / GIB
    found = estimate_memory(config, **run, device_gib=device)
    assert {"optimizer": "qlora_paged_adamw_32bit"} in found.suggestions
    own = estimate_memory(config, **run | found.suggestions[0], device_gib=device)
    assert own.fits
    too_small = estimate_memory(
        config, rank=512, sequence_length=8, device_gib=own.on_card / GIB - 0.001
    )
    assert not any("optimizer" in change for change in too_small.suggestions)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [32, 8])
def test_peak_of_a_step_is_that_of_the_gpu(bits):
    parameters = [
        nn.Parameter(torch.zeros(2048, 4096, device="cuda")) for _ in range(24)
    ]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    expected = OPTIMIZERS[f"qlora_paged_adamw_{bits}bit"](parameters)
    # Room for the ring alone, so that nothing resides.
    adam = PagedAdamW(parameters, state_bits=bits, device_budget=expected.step)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        adam.step()
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before
    assert adam.resident_share == 0
    assert adam.counters.bytes_in == 3 * expected.paged_state
    assert taken == pytest.approx(expected.step, rel=0.01)
