"""What the package promises as a whole: its interface, and a light import."""

import subprocess
import sys

import torch

import qlora_lib


def test_the_interface_runs_as_the_book_writes_it():
    from qlora_lib import (
        FP4,
        INT4,
        NF4,
        TOY,
        Codebook,
        Linear4bit,
        QuantizedTensor,
        normal_float,
        quantize,
    )
    from qlora_lib.numerics import dynamic, floating_point, integer, lloyd_max

    assert Codebook("toy", (-1.0, 0.3, 0.5, 1.0), ties="upper") == TOY
    q = quantize(torch.tensor([10.0, -3.0, 5.0, 4.0]), TOY, block_size=None)
    assert isinstance(q, QuantizedTensor)
    assert q.codes.tolist() == [3, 1, 2, 2]
    assert q.dequantize().tolist() == [10.0, 3.0, 5.0, 5.0]

    weight = torch.randn(32, 128, dtype=torch.bfloat16)
    q = quantize(weight, NF4, block_size=64, double_quant=True)
    assert q.packed.dtype == torch.uint8
    assert isinstance(q.scales, QuantizedTensor)
    assert q.codebook == NF4 == normal_float(4)
    assert (q.block_size, q.shape, q.dtype) == (64, weight.shape, weight.dtype)
    assert q.nbytes == 32 * 128 // 2 + 64 + 4 + 4
    assert q.bits_per_parameter == 8 * q.nbytes / weight.numel()
    assert q.dequantize(dtype=torch.float64).dtype == torch.float64
    assert q.to("cpu").device == torch.device("cpu")

    for codebook in (INT4, FP4, integer(4), floating_point(2, 1), lloyd_max(4)):
        assert isinstance(codebook.name, str)
        assert codebook.values.tolist() == sorted(codebook.values.tolist())
        assert codebook.bits == 4
        assert len(codebook.boundaries) == len(codebook.values) - 1
    assert dynamic(bits=8).bits == 8

    linear = torch.nn.Linear(128, 32)
    layer = Linear4bit.from_linear(
        linear, codebook=NF4, block_size=64, double_quant=True
    )
    x = torch.randn(3, 128)
    expected = quantize(linear.weight, NF4, 64, double_quant=True).dequantize()
    torch.testing.assert_close(layer(x), x @ expected.T + linear.bias)


def test_every_public_name_is_there():
    for name in qlora_lib.__all__:
        assert hasattr(qlora_lib, name)


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import qlora_lib; "
        "print(*sorted(set(sys.modules) - before))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    imported = answer.stdout.split()
    packages = {module.partition(".")[0] for module in imported}
    assert "qlora_lib" in packages
    # Over torch, only its own modules and those of the standard library.
    assert packages - sys.stdlib_module_names == {"qlora_lib"}
    own = {
        module.split(".")[1] for module in imported if module.startswith("qlora_lib.")
    }
    assert own == {"kernels", "memory", "nn", "numerics", "optim"}


def test_on_the_cpu_triton_is_never_imported():
    code = (
        "import sys, torch; from qlora_lib import NF4, dequantize, matmul, quantize; "
        "q = quantize(torch.randn(64, 64), NF4, double_quant=True); "
        "matmul(torch.ones(2, 64), q); dequantize(q); "
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
