"""The benchmark of the linear layers, as far as it goes without a GPU."""

import dataclasses
import json

import pytest
import torch

import matmul
from matmul_report import (
    BOTH,
    FORWARD,
    SHAPES,
    SMALLEST_TB_S,
    TOKENS,
    cells,
    report,
    table,
    targets,
)
from peers import CODECS, MAKERS, nearest_key, quantize_affine
from timing import Captured, copies_needed

N, K, M = 128, 256, 5
LAYERS = ("qlora_lib", "bf16", "bitsandbytes")
CODEC_SIDE = 256


class Replayed:
    """Stands for a CUDA graph: a replay runs the calls and writes their outputs."""

    def __init__(self, calls, outputs):
        self.calls, self.outputs = calls, outputs

    def replay(self):
        for call, outputs in zip(self.calls, self.outputs, strict=True):
            for output, again in zip(outputs, call(), strict=True):
                output.copy_(again)


def capture_on_cpu(calls):
    outputs = [tuple(output.clone() for output in call()) for call in calls]
    return Captured(Replayed(calls, outputs), outputs)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A run that measures on the CPU, where every call takes 12.5 us."""
    torch.manual_seed(0)
    monkeypatch.setattr(matmul, "DEVICE", "cpu")
    monkeypatch.setattr(matmul, "CODEC_SIDE", CODEC_SIDE)
    monkeypatch.setattr(matmul, "PACKAGES", ("torch",))
    monkeypatch.setattr(matmul, "capture", capture_on_cpu)
    monkeypatch.setattr(matmul, "copies_needed", lambda nbytes: 3)
    monkeypatch.setattr(matmul, "seconds_per_call", lambda captured: 12.5e-6)
    monkeypatch.setattr(matmul, "seconds_as_called", lambda call: 12.5e-6)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return matmul.Run(tmp_path, minutes=8)


def weight_and_activations():
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(N, K, dtype=torch.bfloat16)
    x, grad_y = (torch.randn(M, size, dtype=torch.bfloat16) for size in (K, N))
    return weight, x, grad_y


def record_of(times, bandwidth=()):
    rows = [{**cell, "us": us} for cell, us in times]
    return {
        "ceilings": {"copy_tb_s": 4.0, "bf16_tflop_s": 800.0},
        "rows": rows,
        "bandwidth": list(bandwidth),
        "failed": [],
    }


def complete_record(us):
    """Every cell that the targets look at; ``us`` tells the time of each."""
    every = cells(LAYERS, SHAPES, TOKENS, (FORWARD, BOTH))
    bandwidth = [
        {"library": "qlora_lib", "operation": operation, "us": 1.0, "tb_s": tb_s}
        for operation, tb_s in SMALLEST_TB_S.items()
    ]
    return record_of([(cell, us(cell)) for cell in every], bandwidth)


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_agrees_with_the_weight_that_it_dequantizes(name, direction):
    weight, x, grad_y = weight_and_activations()
    layer = MAKERS[name](weight)
    outputs = matmul.step(layer, direction, x, grad_y)
    expected = matmul.reference(layer.dense(), direction, x, grad_y)
    assert [output.shape for output in outputs] == [(M, N), (M, K)][: len(outputs)]
    assert len(outputs) == (1 if direction == FORWARD else 2)
    assert 0 < matmul.largest_error(outputs, expected, layer.tolerance) < 1e-2


def test_the_check_refuses_a_wrong_or_unwritten_output():
    weight, x, grad_y = weight_and_activations()
    layer = MAKERS["qlora_lib"](weight)
    wrong = matmul.reference(weight.float(), FORWARD, x, grad_y)  # not quantized
    (output,) = matmul.step(layer, FORWARD, x, grad_y)
    with pytest.raises(ArithmeticError, match="relative errors .* above 0.01"):
        matmul.largest_error((output,), wrong, layer.tolerance)
    right = matmul.reference(layer.dense(), FORWARD, x, grad_y)
    output[-1, -1] = torch.nan
    with pytest.raises(ArithmeticError, match="nan"):
        matmul.largest_error((output,), right, layer.tolerance)
    with pytest.raises(ArithmeticError, match="unwritten"):
        matmul.check_finite(Captured(None, [(output,)]))


def test_poison_overwrites_every_output():
    outputs = [(torch.zeros(3), torch.zeros(3, dtype=torch.uint8)), (torch.ones(2),)]
    Captured(None, outputs).poison()
    assert outputs[0][0].isnan().all() and outputs[1][0].isnan().all()
    assert (outputs[0][1] == 0xA5).all()


def test_copies_exceed_the_cache():
    assert copies_needed(10**9) == 2
    assert copies_needed(8_650_752) * 8_650_752 > 300e6


def test_rows_have_the_documented_fields(run):
    for name in LAYERS:
        matmul.measure_layer(run, name, N, K, (1, M), (FORWARD, BOTH))
    assert run.record["failed"] == []
    asked = cells(LAYERS, [(N, K)], (1, M), (FORWARD, BOTH))
    measured = run.record["rows"]
    fields = ("layer", "n", "k", "m", "direction")
    assert [{name: row[name] for name in fields} for row in measured] == asked
    assert all(set(row) == {*fields, "us", "relative_error"} for row in measured)
    assert {row["us"] for row in measured} == {12.5}
    widths = run.record["bytes_per_weight"]
    assert widths["bf16"] == 2
    assert 0.5 < widths["qlora_lib"] < 0.53 and 0.5 < widths["bitsandbytes"] < 0.53


def test_a_run_writes_its_record(run, tmp_path):
    run.record["rows"] = [{**cells(["bf16"], [(N, K)], [1], [FORWARD])[0], "us": 1.0}]
    run.write()
    record = json.loads((tmp_path / "matmul.json").read_text())
    assert {"hardware", "versions", "commit", "date", "method"} <= set(record)
    assert record["rows"] == run.record["rows"]
    assert len(record["targets"]) == len(targets(run.record))


@pytest.mark.parametrize("arguments", [["--quick"], ["--layers", "bf16"]])
def test_a_partial_run_does_not_replace_the_record(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["matmul.py", *arguments])
    with pytest.raises(SystemExit):
        matmul.main()
    assert "need --out" in capsys.readouterr().err


def test_a_wrong_layer_is_reported_and_not_timed(run, monkeypatch):
    def make(weight):
        layer = MAKERS["bf16"](weight)
        return matmul.Layer(layer.forward, None, lambda: layer.dense() * 1.1, 1)

    monkeypatch.setitem(matmul.MAKERS, "wrong", make)
    matmul.measure_layer(run, "wrong", N, K, (M,), (FORWARD, BOTH))
    assert run.record["rows"] == []
    (failure,) = run.record["failed"]  # nothing in the direction that it lacks
    assert (failure["layer"], failure["m"]) == ("wrong", M)
    assert failure["error"].startswith("ArithmeticError: relative errors")


def test_what_there_is_no_time_for_is_reported(run):
    run.minutes = 0
    matmul.measure_layer(run, "bf16", N, K, (M,), (FORWARD,))
    assert run.record["rows"] == []
    (failure,) = run.record["failed"]
    assert failure["error"] == "TimeoutError: not measured within --minutes 0"


def test_a_peer_that_cannot_be_made_is_reported(run, monkeypatch):
    def make(weight):
        raise ImportError("No module named 'absent'")

    monkeypatch.setitem(matmul.MAKERS, "absent", make)
    assert matmul.usable(run, ["bf16", "absent"]) == ["bf16"]
    assert run.record["failed"] == [
        {"layer": "absent", "error": "ImportError: No module named 'absent'"}
    ]


@pytest.mark.parametrize(
    ("library", "operations"), [("qlora_lib", 3), ("bitsandbytes", 2)]
)
def test_the_bandwidths_of_a_codec(run, library, operations):
    matmul.measure_codec(run, library)
    assert run.record["failed"] == []
    rows = run.record["bandwidth"]
    assert [row["operation"] for row in rows] == list(SMALLEST_TB_S)[:operations]
    assert {row["tb_s"] for row in rows} == {
        round(2.5 * CODEC_SIDE**2 / 12.5e-6 / 1e12, 3)
    }


def test_a_codec_that_leaves_codes_unwritten_is_reported(run, monkeypatch):
    codec = CODECS["qlora_lib"]()

    def kernel(weight):
        packed, scales = codec.kernel(weight)
        packed[-1] += 1
        return packed, scales

    broken = dataclasses.replace(codec, kernel=kernel)
    monkeypatch.setitem(matmul.CODECS, "qlora_lib", lambda: broken)
    matmul.measure_codec(run, "qlora_lib")
    operations = [row["operation"] for row in run.record["bandwidth"]]
    assert operations == ["dequantize", "quantize"]
    (failure,) = run.record["failed"]
    assert failure["operation"] == "quantize_kernel"
    assert "codes differ" in failure["error"]


def test_targets_are_met_by_a_fast_library():
    fast = complete_record(lambda cell: 1.0 if cell["layer"] == "qlora_lib" else 1.5)
    found = targets(fast)
    assert all(target["met"] is True and not target["missing"] for target in found)
    asked = {target["target"]: target["asked"] for target in found}
    assert asked["M=1, 28672x8192"] == "<= 40 us"
    assert asked["M=256, 28672x8192"] == "<= 182 us"
    assert asked["dequantize 268M weights"] == ">= 3.9 TB/s"


def test_a_target_names_each_cell_that_falls_short():
    def us(cell):
        slow = cell["layer"] == "qlora_lib" and cell["direction"] == FORWARD
        return 60.0 if slow and (cell["n"], cell["m"]) == (4096, 16) else 3.0

    found = {(row["target"], row["asked"]): row for row in targets(complete_record(us))}
    alone = found["M=16, 4096x4096", "<= 8 us"]
    assert (alone["measured"], alone["met"]) == (60.0, False)
    ratio = found["every M, every shape, forward", "<= 1.05x bf16"]
    assert (ratio["measured"], ratio["met"]) == (20.0, False)
    assert ratio["short"] == ["4096x4096 M=16: 20.0x", "4096x11008 M=16: 20.0x"]
    both = found["every M, every shape, forward+backward", "<= 1.05x bf16"]
    assert both["met"] is True


def test_a_limit_is_met_at_its_value_and_not_above():
    for factor, met in ((1.05, True), (1.06, False)):
        record = complete_record(
            lambda cell, factor=factor: factor if cell["layer"] == "qlora_lib" else 1.0
        )
        ratio = targets(record)[6]
        assert ratio["target"] == "M=4096, every shape, forward"
        assert (ratio["measured"], ratio["met"]) == (factor, met)


def test_targets_name_what_is_missing():
    record = complete_record(lambda cell: 1.0)
    record["bandwidth"] = []
    record["rows"] = [
        row
        for row in record["rows"]
        if (row["layer"], row["n"], row["k"], row["m"]) != ("bf16", 11008, 4096, 4096)
    ]
    found = {(row["target"], row["asked"]): row for row in targets(record)}
    ratio = found["M=4096, every shape, forward", "<= 1.05x bf16"]
    assert (ratio["met"], ratio["missing"]) == (None, ["11008x4096 M=4096"])
    bandwidth = found["quantize 268M weights", ">= 3.0 TB/s"]
    assert (bandwidth["measured"], bandwidth["met"]) == (None, None)
    assert bandwidth["missing"] == ["quantize"]
    assert all(target["met"] is None for target in targets(record_of([])))


def test_the_table_has_a_line_for_each_layer_and_a_column_for_each_m():
    every = cells(["qlora_lib", "bf16"], [(N, K)], (1, 2), (FORWARD,))
    lines = table([{**cell, "us": 10.0 * cell["m"]} for cell in every][:-1])
    assert [line.split() for line in lines] == [
        [f"{N}x{K}", "1", "2", "forward"],
        ["qlora_lib", "10.0", "20.0"],
        ["bf16", "10.0", "-"],
    ]


def test_the_report_ends_with_the_tables_and_tells_failures():
    record = complete_record(lambda cell: 1234.5)
    record["targets"] = targets(record)
    record["failed"] = [{"layer": "gemlite", "error": "ImportError: no"}] * 12
    lines = report(record).splitlines()
    assert "copy_tb_s 4.0" in lines
    assert sum(line.startswith("NOT MET") for line in lines) == 6
    assert "failed  and 2 more" in lines
    assert lines[-1].split() == ["bitsandbytes", *["1234"] * len(TOKENS)]
    assert max(len(line) for line in lines) <= 140


def test_affine_codes_stand_for_the_weight():
    weight, _, _ = weight_and_activations()
    codes, scales, minimum = quantize_affine(weight)
    assert codes.dtype == torch.uint8 and codes.max() == 15
    groups = codes.float().view(N, -1, 64) * scales.float()[..., None]
    values = (groups + minimum.float()[..., None]).view(N, K)
    assert (values - weight.float()).norm() / weight.float().norm() < 0.12


def test_gemlite_gets_the_configuration_of_the_nearest_sizes():
    keys = [(1, 4096, 4096, 64, 8, 104), (16, 28672, 4096, 64, 8, 104)]
    other_type = (16, 28672, 8192, 64, 4, 108)
    assert nearest_key([*keys, other_type], 8, 28672, 8192) == keys[1]
    assert nearest_key([*keys, other_type], 2, 4096, 11008) == keys[0]
