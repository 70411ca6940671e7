"""Launcher: what it calls again is the program that Triton would find for these arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from kernel_cases import INTERPRETED  # noqa: E402

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from squareq_fx.kernels import dispatch, launch, reference  # noqa: E402
from squareq_fx.kernels.launch import Launcher  # noqa: E402


@triton.jit(do_not_specialize=["M"])
def _copy(x_ptr, y_ptr, M, N, stride, BLOCK: tl.constexpr, NAME: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs * stride, mask=offs < M * N), mask=offs < M * N)


_specialised = create_function_from_signature(_copy.signature, _copy.params, make_backend(GPUTarget("cuda", 90, 32)))
_BYTES = torch.zeros(4096, dtype=torch.uint8)


def pointer(dtype: torch.dtype, offset: int) -> torch.Tensor:
    start = -_BYTES.data_ptr() % 16 + offset
    return _BYTES[start : start + 1024].view(dtype)


@st.composite
def arguments(draw: st.DrawFn) -> tuple[Any, ...]:
    """Pointers, free integers, sizes, constants, options; of few kinds, so that two are often alike."""
    dtypes = st.sampled_from((torch.int8, torch.float32))
    tensors = st.builds(pointer, dtypes, st.sampled_from((0, 16, 4)))
    described = st.builds(
        lambda dtype, k: TensorDescriptor(pointer(dtype, 0), [4, 32], [32, 1], [4, k]), dtypes, st.sampled_from((16, 32))
    )
    anything = st.one_of(tensors, described, st.none())
    ints = st.sampled_from((1, 2, 16, 17, 32))
    free = st.sampled_from((1, 16, 17, 2**31))
    constants = st.tuples(st.sampled_from((16, 32)), st.sampled_from(("none", "gelu")))
    first = draw(st.one_of(tensors, described))
    options = {"num_warps": draw(st.sampled_from((2, 4)))}
    return (first, draw(anything)), (draw(free),), (draw(ints), draw(ints)), draw(constants), options


@given(arguments(), arguments())
def test_of_one_kind_is_what_triton_compiles_once(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    kinds = [launch._kind(0, *given) for given in (one, other)]
    programs = []
    for pointers, free, sizes, constants, options in (one, other):
        _, specialised, rest = _specialised(*pointers, *free, *sizes, *constants, **options)
        programs.append((specialised, rest))
    if kinds[0] is not None and kinds[0] == kinds[1]:
        assert programs[0] == programs[1]
    for (pointers, *_), kind in zip((one, other), kinds, strict=True):
        assert (kind is None) == any(isinstance(t, torch.Tensor) and t.data_ptr() % 16 for t in pointers)


class Jit:
    """Stands for a JIT function and for what it compiled; keeps how it was called."""

    def __init__(self) -> None:
        self.looked_up: list[tuple[Any, ...]] = []
        self.called: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            (self.called if "stream" in options else self.looked_up).append((grid, arguments, options))
            return self

        return run


def test_arguments_of_a_kind_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what a CPU tensor says it lies on
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    launcher, jit = Launcher(_copy), Jit()
    launcher._kernel = jit
    x, y = pointer(torch.float32, 0), pointer(torch.float32, 64)
    for rows, programs in ((3, 1), (5, 2), (5, 2)):
        launcher(programs, (x, y), (rows,), (16, 1), (32, "none"), num_warps=4)
    assert jit.looked_up == [((1,), (x, y, 3, 16, 1, 32, "none"), {"num_warps": 4})]
    assert jit.called == [((2, 1, 1), (x, y, 5, 16, 1, 32, "none"), {"stream": 7})] * 2
    launcher(1, (x, y), (5,), (17, 1), (32, "none"), num_warps=4)
    assert len(jit.looked_up) == 2
    for _ in range(2):  # misaligned: always Triton's way
        launcher(1, (pointer(torch.float32, 4), y), (5,), (16, 1), (32, "none"), num_warps=4)
    assert len(jit.looked_up) == 4 and len(jit.called) == 2


def test_tensors_on_the_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match="CUDA devices but the tensors are on cpu"):
        Launcher(_copy).check(torch.ones(1))


@pytest.mark.gpu
@pytest.mark.parametrize("compute", ["w8a16", "w8a8"])
def test_layers_that_differ_in_anything_get_their_own_program(compute: str) -> None:
    """Every combination twice, in an order that mixes them: the second round calls what the first has left."""
    generator = torch.Generator("cuda").manual_seed(0)
    found: dict[Any, list[torch.Tensor]] = {}
    for _ in range(2):
        for rows in (1, 2, 16, 17, 130, 300):
            for width, depth, skip in ((64, 128, 0), (65, 128, 0), (64, 127, 0), (64, 128, 1), (64, 128, 16)):
                for dtype in (torch.bfloat16, torch.float32):
                    case = rows, width, depth, skip, dtype
                    generator.manual_seed(hash(case[:4]) % 1000)
                    x = torch.randn(rows, depth + skip, device="cuda", generator=generator).to(dtype)[:, skip:]
                    layer = reference.quantize_weight(torch.randn(width, depth, device="cuda", generator=generator))
                    found.setdefault(case, []).append(dispatch.int8_linear(x, *layer, None, compute))
                    want = reference.int8_linear(x, *layer)
                    assert torch.cosine_similarity(found[case][-1].double().flatten(), want.double().flatten(), 0) > 0.99
    assert all(torch.equal(first, second) for first, second in found.values())
