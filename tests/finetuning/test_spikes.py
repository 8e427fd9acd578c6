"""Steps that run out of memory on the way, with errors that are raised by hand."""

import weakref

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from qlora_lib.finetuning.spikes import SpikeTrainer
from qlora_lib.finetuning.training import finetune
from qlora_lib.optim import PagedAdamW, SimulatedDevice

PARTS = 2
RUN = {"steps": 3, "batch_size": 4, "gradient_accumulation": PARTS}
LAYERS = "base_model.model.model.layers"
# Of all gradients, those of the last layer come first.
EARLY_GRADIENT = f"{LAYERS}.1.self_attn.q_proj.lora_B.default.weight"
LATE_GRADIENT = f"{LAYERS}.0.self_attn.q_proj.lora_B.default.weight"


class Paging:
    """A factory of optimizers on simulated devices; keeps the one that it made."""

    def __init__(self, **options):
        self.options = {"device": SimulatedDevice(2**24), "page_bytes": 2**14}
        self.options |= options

    def __call__(self, parameters, lr):
        self.made = PagedAdamW(parameters, lr=lr, **self.options)
        return self.made


class Spike:
    """Raises in the given calls, counted from 1."""

    def __init__(self, *calls):
        self.calls, self.count = calls, 0

    def __call__(self, *_):
        self.count += 1
        if self.count in self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory")


def in_forward(model, spike):
    model.get_submodule(f"{LAYERS}.1").mlp.register_forward_hook(spike)


def in_backward(name):
    def inject(model, spike):
        model.get_parameter(name).register_hook(spike)

    return inject


def train(model, tokenizer, examples, optimizer, **options):
    run = {**RUN, "learning_rate": 1e-2, "optimizer": optimizer, **options}
    losses = finetune(model, tokenizer, examples, **run)
    return losses, [p.detach().clone() for p in model.parameters() if p.requires_grad]


def assert_same_bits(first, second):
    assert first[0] == second[0]
    assert all(map(torch.equal, first[1], second[1]))


SPIKES = {
    "forward": in_forward,
    "backward, at first": in_backward(EARLY_GRADIENT),
    "backward, at last": in_backward(LATE_GRADIENT),
}


@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize("inject", SPIKES.values(), ids=SPIKES.keys())
def test_a_spike_changes_no_bit(fresh, byte_tokenizer, examples, inject, part, caplog):
    expected = train(fresh(), byte_tokenizer, examples, Paging())
    # The second step of three, where there is state on the device to evict.
    model, paging, spike = fresh(), Paging(), Spike(PARTS + part)
    inject(model, spike)
    found = train(model, byte_tokenizer, examples, paging, gradient_checkpointing=False)
    assert_same_bits(found, expected)
    assert paging.made.counters.evictions == 1
    # What was computed again is the parts of that one step, up to the one that failed.
    assert spike.count == 3 * PARTS + part
    assert "GPU memory ran out in step 2" in caplog.text


def test_it_survives_with_layers_that_are_computed_again(
    fresh, byte_tokenizer, examples
):
    expected = train(fresh(), byte_tokenizer, examples, Paging())
    # A layer's forward pass runs twice in each part: here the second time.
    model, paging, spike = fresh(), Paging(), Spike(4 * PARTS)
    model.get_submodule(f"{LAYERS}.1.self_attn").register_forward_hook(spike)
    assert_same_bits(train(model, byte_tokenizer, examples, paging), expected)
    assert paging.made.counters.evictions == 1


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_activations_of_the_failed_attempt_are_freed_before_the_next(
    fresh, byte_tokenizer, examples, gradient_checkpointing
):
    model, held, alive = fresh(), [], []
    # The first layer's output of the last pass, noted as the next one begins.
    model.get_input_embeddings().register_forward_hook(
        lambda *_: alive.append([tensor() is not None for tensor in held])
    )
    model.get_submodule(f"{LAYERS}.0").register_forward_hook(
        lambda _, __, output: held.__setitem__(slice(None), [weakref.ref(output)])
    )
    spike = Spike(PARTS + 1)
    in_forward(model, spike)
    train(
        model,
        byte_tokenizer,
        examples,
        Paging(),
        gradient_checkpointing=gradient_checkpointing,
    )
    passes = 3 * PARTS + 1
    assert alive == [[]] + [[False]] * (passes - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_memory_of_a_failed_backward_pass_is_freed_on_the_gpu(
    fresh, byte_tokenizer, examples, gradient_checkpointing
):
    # On a CPU autograd keeps what a failed pass had still to do until the next one.
    model, in_use = fresh().cuda(), []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda *_: in_use.append(torch.cuda.memory_allocated())
    )
    spike = Spike(PARTS + 1)
    in_backward(EARLY_GRADIENT)(model, spike)
    paging = Paging(device=None)
    run = {"gradient_checkpointing": gradient_checkpointing}
    train(model, byte_tokenizer, examples, paging, **run)
    # The pass that failed, and the same one again, with the state on the host.
    failed, again = in_use[PARTS : PARTS + 2]
    assert failed - again >= paging.made.state_bytes


def test_spikes_may_come_again(fresh, byte_tokenizer, examples):
    budget = {"device_budget": 2**20}  # so that pages return as soon as they may
    expected = train(fresh(), byte_tokenizer, examples, Paging(**budget), steps=5)
    model, paging, spike = fresh(), Paging(**budget), Spike(3, 8)
    in_backward(LATE_GRADIENT)(model, spike)
    found = train(model, byte_tokenizer, examples, paging, steps=5)
    assert_same_bits(found, expected)
    assert paging.made.counters.evictions == 2


def test_parts_draw_their_own_numbers_whatever_a_callback_draws(
    fresh, byte_tokenizer, examples
):
    class Drawing(TrainerCallback):
        def on_substep_end(self, *arguments, **options):
            torch.rand(3)

    callbacks = {"callbacks": [Drawing()]}
    expected = train(fresh(), byte_tokenizer, examples, Paging(), **callbacks)
    model, spike = fresh(), Spike(2 * PARTS)
    in_backward(LATE_GRADIENT)(model, spike)
    found = train(model, byte_tokenizer, examples, Paging(), **callbacks)
    assert_same_bits(found, expected)


def test_a_second_spike_in_the_same_step_is_raised(fresh, byte_tokenizer, examples):
    model, paging, spike = fresh(), Paging(), Spike(PARTS + 1, PARTS + 2)
    in_backward(LATE_GRADIENT)(model, spike)
    with pytest.raises(torch.OutOfMemoryError):
        train(model, byte_tokenizer, examples, paging)
    assert paging.made.counters.evictions == 1
    assert spike.count == PARTS + 2


def test_nothing_is_tried_again_where_nothing_can_be_evicted(
    fresh, byte_tokenizer, examples
):
    # Before the first step of the optimizer there is no state on the device.
    model, spike = fresh(), Spike(1)
    in_forward(model, spike)
    with pytest.raises(torch.OutOfMemoryError):
        train(model, byte_tokenizer, examples, Paging())
    assert spike.count == 1


def test_an_optimizer_that_cannot_evict_leaves_the_error_as_it_is(
    fresh, byte_tokenizer, examples
):
    model, spike = fresh(), Spike(PARTS + 1)
    in_forward(model, spike)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        train(model, byte_tokenizer, examples, torch.optim.AdamW)
    assert spike.count == PARTS + 1


@pytest.mark.parametrize("processes", [1, 2])
def test_of_several_processes_none_begins_again_alone(
    fresh, monkeypatch, tmp_path, processes
):
    model, spike = fresh(), Spike(1)
    optimizer = Paging()([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = SpikeTrainer(model, arguments, optimizers=(optimizer, None))
    monkeypatch.setattr(Trainer, "training_step", spike)
    monkeypatch.setattr(TrainingArguments, "world_size", processes)
    if processes == 1:
        trainer.training_step(model, {})
    else:
        with pytest.raises(torch.OutOfMemoryError):
            trainer.training_step(model, {})
    assert spike.count == (2 if processes == 1 else 1)
    assert optimizer.counters.evictions == (1 if processes == 1 else 0)


def test_other_errors_are_raised(fresh, byte_tokenizer, examples):
    def fail(*_):
        raise RuntimeError("something else")

    model, paging = fresh(), Paging()
    model.get_parameter(EARLY_GRADIENT).register_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        train(model, byte_tokenizer, examples, paging)
    assert paging.made.counters.evictions == 0
