"""Training of adapters on a quantized model, and the loss that judges it."""

import copy
import math

import pytest
import torch
from transformers import TrainerCallback

from qlora_lib.finetuning.data import InstructionPair, encode_pairs
from qlora_lib.finetuning.packing import pack
from qlora_lib.finetuning.training import add_adapters, answer_losses, finetune
from qlora_lib.integrations.transformers import compile_decoder_layers
from qlora_lib.nn import quantize_linears

PAIRS = [
    InstructionPair("def f(a):\n    return a + 1", "Add one."),
    InstructionPair("def g(a, b):\n    return a * b", "Multiply two numbers."),
    InstructionPair("def h():\n    return 0", "Return zero always."),
]


@pytest.fixture
def examples(byte_tokenizer):
    return encode_pairs(PAIRS, byte_tokenizer, max_length=96)


@pytest.fixture
def adapted_model(tiny_model):
    quantize_linears(tiny_model)
    torch.manual_seed(1)
    return add_adapters(tiny_model, rank=4, alpha=8, dropout=0.0)


def test_answer_losses_are_the_mean_over_the_answer_alone(
    tiny_model, byte_tokenizer, examples
):
    losses = answer_losses(tiny_model, byte_tokenizer, examples, batch_size=2)
    assert losses.shape == (3,)
    for example, loss in zip(examples, losses, strict=True):
        with torch.no_grad():
            logits = tiny_model(torch.tensor([example["input_ids"]])).logits[0]
        log_p = logits.double().log_softmax(-1)
        answer = [i for i, label in enumerate(example["labels"]) if label != -100]
        expected = -sum(log_p[i - 1, example["input_ids"][i]] for i in answer)
        assert loss.item() == pytest.approx(expected.item() / len(answer), rel=1e-5)


def test_answer_losses_keep_the_training_mode(tiny_model, byte_tokenizer, examples):
    for training in (True, False):
        tiny_model.train(training)
        answer_losses(tiny_model, byte_tokenizer, examples)
        assert tiny_model.training is training


def test_finetune_trains_the_adapters_and_leaves_the_base_alone(
    adapted_model, byte_tokenizer, examples, capsys
):
    before = copy.deepcopy(adapted_model.state_dict())
    held = answer_losses(adapted_model, byte_tokenizer, examples).mean()
    losses = finetune(
        adapted_model,
        byte_tokenizer,
        examples,
        steps=20,
        batch_size=3,
        learning_rate=1e-2,
    )
    assert len(losses) == 20
    assert losses[0] == pytest.approx(held.item(), rel=0.1)
    after = answer_losses(adapted_model, byte_tokenizer, examples).mean()
    assert after < held - 0.5
    changed = {
        name
        for name, tensor in adapted_model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {name for name in before if "lora_" in name}
    assert capsys.readouterr().out == ""


def test_finetune_repeats_with_the_same_seed(adapted_model, byte_tokenizer, examples):
    twin = copy.deepcopy(adapted_model)
    runs = [
        finetune(model, byte_tokenizer, examples, steps=3, batch_size=2, seed=5)
        for model in (adapted_model, twin)
    ]
    assert runs[0] == runs[1]


def test_finetune_refuses_nothing_to_learn_from(adapted_model, byte_tokenizer):
    with pytest.raises(ValueError, match="examples is empty"):
        finetune(adapted_model, byte_tokenizer, [], steps=1)


def test_finetune_refuses_nothing_to_train(tiny_model, byte_tokenizer, examples):
    tiny_model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        finetune(tiny_model, byte_tokenizer, examples, steps=1)


@pytest.mark.parametrize("steps", [0, -1])
def test_finetune_refuses_no_steps(adapted_model, byte_tokenizer, examples, steps):
    with pytest.raises(ValueError, match=f"steps must be .* got {steps}"):
        finetune(adapted_model, byte_tokenizer, examples, steps=steps)


def test_answer_losses_of_nothing(tiny_model, byte_tokenizer):
    with pytest.raises(ValueError, match="examples is empty"):
        answer_losses(tiny_model, byte_tokenizer, [])


def test_a_loss_that_is_no_number_is_returned_as_such(
    adapted_model, byte_tokenizer, examples
):
    adapter = next(p for p in adapted_model.parameters() if p.requires_grad)
    adapter.data.fill_(float("nan"))
    losses = finetune(adapted_model, byte_tokenizer, examples, steps=2)
    assert all(math.isnan(loss) for loss in losses)


def test_callbacks_see_every_step(adapted_model, byte_tokenizer, examples):
    seen = []

    class Watcher(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append((state.global_step, model))
            control.should_training_stop = state.global_step == 2

    losses = finetune(
        adapted_model, byte_tokenizer, examples, steps=5, callbacks=[Watcher()]
    )
    assert len(losses) == 2
    assert seen == [(1, adapted_model), (2, adapted_model)]


# PyTorch scripts methods of its own when its compiler is first imported.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
# The compiler instantiates what PyTorch says not to instantiate.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_layers_learn_the_same(tiny_model, byte_tokenizer, examples):
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        model = copy.deepcopy(tiny_model)
        quantize_linears(model)
        torch.manual_seed(0)
        adapted = add_adapters(model, rank=4, dropout=0.0)
        runs.append(
            finetune(
                adapted,
                byte_tokenizer,
                examples,
                steps=3,
                learning_rate=1e-2,
                compile_layers=compiled,
            )
        )
        layers = [m for m in adapted.modules() if m._compiled_call_impl is not None]
        assert len(layers) == (2 if compiled else 0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=0)


def test_a_model_without_decoder_layers_cannot_be_compiled():
    with pytest.raises(ValueError, match="no decoder layers to compile"):
        compile_decoder_layers(torch.nn.Linear(2, 2))


# Adapters


def test_adapters_stand_beside_every_linear_layer_and_change_nothing(tiny_model):
    ids = torch.arange(1, 20)[None]
    tiny_model.eval()
    names = quantize_linears(tiny_model)
    before = tiny_model(ids).logits
    model = add_adapters(tiny_model)
    assert torch.equal(model(ids).logits, before)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    prefix = "base_model.model."
    assert set(trained) == {
        f"{prefix}{name}.lora_{side}.default.weight" for name in names for side in "AB"
    }
    assert all(p.dtype == torch.float32 for p in trained.values())
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 16, 0.05)
    assert config.task_type == "CAUSAL_LM"


def test_adapters_of_a_16_bit_model_are_trained_in_32_bits(tiny_model):
    model = add_adapters(tiny_model.to(torch.bfloat16), rank=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "named"),
    [({"rank": 0}, "rank"), ({"dropout": 1.0}, "dropout"), ({"dropout": -0.1}, "drop")],
)
def test_adapters_out_of_range(tiny_model, options, named):
    with pytest.raises(ValueError, match=named):
        add_adapters(tiny_model, **options)


def test_adapters_are_not_put_on_adapters(adapted_model):
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(adapted_model)


# The recipe


def trained_weights(model):
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("parts", [2, 6])
def test_a_batch_in_parts_is_the_same_step(
    adapted_model, byte_tokenizer, examples, parts
):
    # The answers have different lengths, so a mean of means would be another loss.
    many = examples * 2
    twin = copy.deepcopy(adapted_model)
    whole = finetune(adapted_model, byte_tokenizer, many, steps=3, batch_size=6)
    split = finetune(
        twin,
        byte_tokenizer,
        many,
        steps=3,
        batch_size=6,
        gradient_accumulation=parts,
    )
    assert split == pytest.approx(whole, rel=1e-5)
    expected = trained_weights(adapted_model)
    for name, weight in trained_weights(twin).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=2e-6)


def test_packed_rows_train_as_their_pairs_do(adapted_model, byte_tokenizer, examples):
    twin = copy.deepcopy(adapted_model)
    rows = pack(examples, 96)
    assert len(rows) == 2
    plain = finetune(adapted_model, byte_tokenizer, examples, steps=3, batch_size=3)
    packed = finetune(twin, byte_tokenizer, rows, steps=3, batch_size=2)
    assert packed == pytest.approx(plain, rel=1e-5)


def test_checkpointing_computes_twice_and_changes_no_bit(
    tiny_model, byte_tokenizer, examples
):
    quantize_linears(tiny_model)
    model = add_adapters(tiny_model, rank=4, dropout=0.2)
    twin = copy.deepcopy(model)
    calls = []
    for each in (model, twin):
        first = each.get_submodule("base_model.model.model.layers.0.input_layernorm")
        first.register_forward_hook(lambda *_, m=each: calls.append(m))
    runs = [
        finetune(each, byte_tokenizer, examples, steps=3, gradient_checkpointing=on)
        for each, on in ((model, True), (twin, False))
    ]
    assert runs[0] == runs[1]
    assert [sum(m is each for m in calls) for each in (model, twin)] == [6, 3]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_given_back_as_it_came(
    adapted_model, byte_tokenizer, examples, training
):
    adapted_model.train(training)
    assert adapted_model.config.use_cache
    finetune(adapted_model, byte_tokenizer, examples, steps=1)
    assert adapted_model.training is training
    assert adapted_model.config.use_cache
    assert not any(
        getattr(module, "gradient_checkpointing", False)
        for module in adapted_model.modules()
    )


class Recording(torch.optim.SGD):
    """Plain descent that keeps the norm of each gradient and the rates."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.norms, self.rates = [], []

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def test_gradients_are_clipped_and_the_rate_is_constant(
    adapted_model, byte_tokenizer, examples
):
    made = []

    def factory(parameters, lr):
        made.append(Recording(parameters, lr))
        return made[-1]

    finetune(
        adapted_model,
        byte_tokenizer,
        examples,
        steps=4,
        learning_rate=0.5,
        optimizer=factory,
    )
    (optimizer,) = made
    assert optimizer.rates == [0.5] * 4
    assert max(optimizer.norms) == pytest.approx(0.3, rel=1e-3)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in adapted_model.parameters() if p.requires_grad
    }


def test_the_optimizer_of_the_paper(adapted_model, byte_tokenizer, examples, tmp_path):
    # The first step of Adam moves every weight by the rate, whatever its gradient.
    before = {n: p.clone() for n, p in trained_weights(adapted_model).items()}
    finetune(
        adapted_model,
        byte_tokenizer,
        examples,
        steps=1,
        learning_rate=1e-3,
        output_dir=tmp_path,
    )
    moved = torch.cat(
        [
            (p - before[name]).abs().flatten()
            for name, p in trained_weights(adapted_model).items()
            if "lora_B" in name
        ]
    )
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-2)
    state = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt")
    (group,) = state["param_groups"]
    assert tuple(group["betas"]) == (0.9, 0.999)
    assert group["weight_decay"] == 0.0


def test_the_progress_bar_shows_the_loss(
    adapted_model, byte_tokenizer, examples, capsys
):
    finetune(adapted_model, byte_tokenizer, examples, steps=2, progress=True)
    output = capsys.readouterr()
    assert "2/2" in output.err
    assert "loss=" in output.err
    assert output.out == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 16, "gradient_accumulation": 5}, "divisor"),
        ({"gradient_accumulation": 0}, "gradient_accumulation=0"),
        ({"save_every": 2}, "output_dir is missing"),
        ({"resume": True}, "output_dir is missing"),
        ({"save_every": 0, "output_dir": "unused"}, "save_every must be"),
    ],
)
def test_finetune_refuses_what_cannot_be(
    adapted_model, byte_tokenizer, examples, options, reason
):
    with pytest.raises(ValueError, match=reason):
        finetune(adapted_model, byte_tokenizer, examples, steps=1, **options)


def test_finetune_refuses_an_example_without_answer(
    adapted_model, byte_tokenizer, examples
):
    mute = {**examples[1], "labels": [-100] * len(examples[1]["labels"])}
    with pytest.raises(ValueError, match=r"examples\[1\] has no label"):
        finetune(adapted_model, byte_tokenizer, [examples[0], mute], steps=1)


def test_finetune_refuses_several_processes(
    adapted_model, byte_tokenizer, examples, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        finetune(adapted_model, byte_tokenizer, examples, steps=1)


def test_answer_losses_of_packed_rows(tiny_model, byte_tokenizer, examples):
    with pytest.raises(ValueError, match="packed"):
        answer_losses(tiny_model, byte_tokenizer, pack(examples, 128))


def test_answer_losses_are_those_without_dropout_and_without_padding(
    adapted_model, byte_tokenizer, examples
):
    adapted_model.train()
    together = answer_losses(adapted_model, byte_tokenizer, examples)
    alone = [answer_losses(adapted_model, byte_tokenizer, [e]) for e in examples]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.gpu
def test_on_a_gpu_training_goes_as_on_the_cpu(adapted_model, byte_tokenizer, examples):
    twin = copy.deepcopy(adapted_model).cuda()
    losses = answer_losses(twin, byte_tokenizer, examples)
    assert losses.device.type == "cpu"
    # finetune moves a model to the GPU where there is one.
    run = finetune(twin, byte_tokenizer, examples, steps=3, batch_size=3)
    assert next(twin.parameters()).device.type == "cuda"
    assert run[0] > run[-1]
    expected = answer_losses(adapted_model, byte_tokenizer, examples)
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-2)


def test_a_model_stays_on_the_cpu(adapted_model, byte_tokenizer, examples):
    # Where there is a GPU the Trainer would else move it there.
    seen = []

    class Note(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(args.use_cpu)

    finetune(adapted_model, byte_tokenizer, examples, steps=1, callbacks=[Note()])
    assert seen == [adapted_model.device.type == "cpu"]


def test_batches_of_nothing_are_refused(tiny_model, byte_tokenizer, examples):
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size .* got {batch_size}"):
            answer_losses(tiny_model, byte_tokenizer, examples, batch_size)
