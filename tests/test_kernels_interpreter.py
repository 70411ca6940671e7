"""The Triton kernels, run by Triton's interpreter on the CPU, and what happens without Triton or CUDA.

Triton decides when it is imported whether it interprets, so each test here has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAYER = """
import torch
from squareq_fx.kernels import dispatch, reference
args = (torch.randn(3, 40), *reference.quantize_weight(torch.randn(5, 40)), None)
"""


def run(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in environment.items() if not k.startswith(("PYTEST_", "COV_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_the_kernel_tests_pass_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    names = ("benchmark", "dequantize", "dispatch", "dx", "gemv", "linear", "matmul", "quantize_rows", "tiles")
    modules = [str(HERE / f"test_kernels_{name}.py") for name in names]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu"]
    result = run("-m", "pytest", *options, *modules, interpret="1")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_the_cpu_path_imports_no_triton_and_starts_no_cuda() -> None:
    code = LAYER + "import sys; assert 'triton' not in sys.modules\n"
    code += "assert torch.equal(dispatch.int8_linear(*args), dispatch.cpu.int8_linear(*args))\n"
    code += "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()\n"
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


def test_a_missing_triton_is_named() -> None:
    code = "import sys; sys.modules['triton'] = None\n" + LAYER + "dispatch.int8_linear(*args)"
    result = run("-c", code, interpret="1")
    assert result.returncode == 1
    assert "RuntimeError: int8 layers on CUDA, or TRITON_INTERPRET=1, need Triton" in result.stderr


@pytest.mark.parametrize(("rows", "compute"), [(3, "w8a16"), (1, "w8a16"), (3, "w8a8")])
def test_asking_for_the_interpreter_too_late_says_so(rows: int, compute: str) -> None:
    pytest.importorskip("triton")
    code = "import triton, os\nfrom squareq_fx.kernels import int8_gemv, int8_linear, quantize_rows\n"
    code += LAYER.replace("randn(3,", f"randn({rows},")
    code += f"os.environ['TRITON_INTERPRET'] = '1'; dispatch.int8_linear(*args, {compute!r})"
    result = run("-c", code)
    assert result.returncode == 1
    assert "set TRITON_INTERPRET=1 before triton is first imported" in result.stderr


def test_the_int8_product_says_so_too() -> None:
    pytest.importorskip("triton")
    code = LAYER + "from squareq_fx.kernels import int8_matmul\nxq, sx = reference.quantize_rows(args[0])\n"
    code += "int8_matmul.int8_matmul(xq, sx, *args[1:], torch.float32)"
    result = run("-c", code)
    assert result.returncode == 1
    assert "ValueError: the Triton kernels run on CUDA devices but the tensors are on cpu" in result.stderr
