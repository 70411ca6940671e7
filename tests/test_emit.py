"""What `compile` returns: a module with the model's answers, whose types and weights nothing can spoil."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backbones import backbone, calls
from compiled import Compiled, compiled, emitted, family_slab
from laws import bits, l2
from models import Function, Mlp, Residual, Spec, dequantized, make_slab, scratch
from safetensors.torch import load_file
from slab_models import UPSTREAM, UPSTREAM_WEIGHTS, TinyNet
from torch import fx, nn

import squareq_fx
from squareq_fx import BindingError, CaptureError, CompiledModule, RuntimeStateError, SlabError, SquareQError, ops
from squareq_fx.emit import emit
from squareq_fx.lowering.lowered import lowered
from squareq_fx.runtime import Runtime
from squareq_fx.tracing.skeleton import skeleton
from squareq_fx.views.units import format_bytes, format_seconds

_FAMILIES = ("flux", "sdxl")
_SPEC = Spec(Residual(Mlp(33)), repeat=3)


class _Toy:
    """A model of three equal blocks; one compile takes a second, so a test may have its own module."""

    def __init__(self) -> None:
        self.model, self.call = _SPEC.build(), _SPEC.inputs()
        self.slab = make_slab(self.model, self.call)
        self.dequantized = dequantized(self.model, self.slab)

    def compile(self, **options: Any) -> CompiledModule:
        return squareq_fx.compile(self.model, self.slab, progress=False, **options)

    def emit(self, until: str = "schedule", **options: Any) -> CompiledModule:
        """Another module of its own, without another capture."""
        return emit(self.stages[until], self.model, self.slab, **options)

    @functools.cached_property
    def stages(self) -> dict[str, fx.GraphModule]:
        return {stage.name: stage.graph for stage in self.compile().history}


@pytest.fixture(scope="module")
def toy() -> _Toy:
    return _Toy()


@pytest.fixture(scope="module")
def streamed(toy: _Toy) -> CompiledModule:
    return toy.compile()


def _state(module: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (t.dtype, bits(t)) for name, t in module.state_dict().items()}


# ------------------------------------------------------------------------------------------------- starting


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_weights_are_on_their_way_while_inductor_works(
    toy: _Toy, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    order: list[str] = []
    monkeypatch.setattr(Runtime, "start_ahead", lambda self: order.append("weights"))

    def take(name: str, function: fx.GraphModule, *_: Any) -> nn.Module:
        order.append("function")
        return lowered(function)

    monkeypatch.setattr("squareq_fx.lowering.backends.compile_function", take)
    module = toy.emit(backend=backend)
    assert order[:2] == (["weights", "function"] if backend == "inductor" else []) and order.count("weights") <= 1
    module.shutdown()


def test_what_was_started_ends_when_inductor_refuses(toy: _Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Runtime] = []
    shutdown = Runtime.shutdown
    monkeypatch.setattr(Runtime, "shutdown", lambda self: (ended.append(self), shutdown(self))[1])

    def refuse(*_: Any) -> nn.Module:
        raise SquareQError("no such compiler")

    monkeypatch.setattr("squareq_fx.lowering.backends.compile_function", refuse)
    with pytest.raises(SquareQError, match="no such compiler"):
        toy.emit(backend="inductor")
    assert len(ended) == 1
    assert not any(thread.name == "squareq-start" for thread in threading.enumerate())


# ------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width", "tokens"), [(3, 5, 7), (2, 2, 1), (6, 4, 19)])
def test_the_answers_of_the_model(family: str, batch: int, height: int, width: int, tokens: int) -> None:
    """One compile, six sizes: the dequantised model's within rounding, the float model's within quantisation."""
    one, call = compiled(family), calls(family, batch, height, width, tokens)
    found = one.module(**call).sample
    assert l2(found, one.expected(**call)) < 1e-5
    with torch.no_grad():
        exact = one.model(**call).sample
    assert float(torch.cosine_similarity(found.flatten(), exact.flatten(), 0)) >= 0.999


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize(
    ("until", "backing"),
    [("schedule", "resident"), ("schedule", "disk"), ("stream", "host"), ("quantize", "host"), ("outline", "host")],
)
def test_every_way_to_hold_the_weights_gives_the_same_bits(family: str, until: str, backing: str) -> None:
    other, call = emitted(family, until, backing), calls(family, 2)  # type: ignore[arg-type]
    assert torch.equal(other(**call).sample, compiled(family).module(**call).sample)
    assert (other.runtime is None) == (until in ("quantize", "outline"))


@pytest.mark.parametrize("until", ["capture", "canonicalize", "quantize", "outline", "stream", "schedule"])
@pytest.mark.parametrize("backing", ["host", "disk", "resident"])
def test_every_stage_and_backing_of_the_toy(until: str, backing: str, toy: _Toy, streamed: CompiledModule) -> None:
    module = toy.emit(until, backing=backing)
    found = module(**toy.call)
    if until in ("capture", "canonicalize"):
        with torch.no_grad():
            assert l2(found, toy.model(**toy.call)) < 1e-6
    else:
        assert torch.equal(found, streamed(**toy.call))
    module.shutdown()


@pytest.mark.parametrize("until", ["capture", "quantize", "stream"])
def test_until(until: str, toy: _Toy, streamed: CompiledModule) -> None:
    seen: list[str] = []
    module = toy.compile(until=until, observe=lambda stage: seen.append(stage.name))
    assert [stage.name for stage in module.history] == seen and seen[-1] == until
    assert l2(module(**toy.call), streamed(**toy.call)) < (0.05 if until == "capture" else 1e-7)
    module.shutdown()


def test_the_slab_alone_is_enough() -> None:
    one, call = compiled("sdxl"), calls("sdxl", 2)
    bare = skeleton(one.model)[0]
    assert all(t.device.type == "meta" for t in (*bare.parameters(), *bare.buffers()))
    from_slab = squareq_fx.compile(bare, one.slab, progress=False)
    assert torch.equal(from_slab(**call).sample, one.module(**call).sample)
    from_slab.shutdown()


def test_an_opened_slab_and_its_path(toy: _Toy, streamed: CompiledModule) -> None:
    module = squareq_fx.compile(toy.model, toy.slab.path, progress=False)
    assert torch.equal(module(**toy.call), streamed(**toy.call))
    module.shutdown()


def test_the_originals_slab() -> None:
    """It holds only the quantised layers, so the rest comes from the model."""
    model = TinyNet()
    model.load_state_dict(load_file(UPSTREAM_WEIGHTS))
    model.eval().requires_grad_(False)
    example = {"x": torch.randn(2, 5, 48)}
    with squareq_fx.open_slab(UPSTREAM) as slab:
        module = squareq_fx.compile(model, slab, example_inputs=example, progress=False)
        assert module.runtime is not None and len(module.runtime.store.segments) >= 3
        x = torch.randn(3, 9, 48)
        assert l2(module(x), dequantized(model, slab)(x)) < 1e-6
        module.shutdown()


# --------------------------------------------------------------------------------------- looks like the model


@pytest.mark.parametrize("family", _FAMILIES)
def test_config_dtype_device(family: str) -> None:
    one = compiled(family)
    assert one.module.config is one.model.config
    assert one.module.dtype == torch.float32 and one.module.device == torch.device("cpu")
    assert not one.module.training


def test_submodules_can_be_looked_up() -> None:
    one = compiled("sdxl")
    assert one.module.add_embedding.linear_1.in_features == one.model.add_embedding.linear_1.in_features
    assert len(one.module.down_blocks) == len(one.model.down_blocks)
    assert one.module.down_blocks[0].resnets[0].in_channels == one.model.down_blocks[0].resnets[0].in_channels
    assert bool(one.module.down_blocks)
    with pytest.raises(AttributeError, match="no_such_block"):
        _ = one.module.no_such_block
    layer = compiled("flux").module.transformer_blocks[0].attn.to_q
    assert layer.weight.device.type == "meta", "a look-up must not keep float weights alive"


@pytest.mark.parametrize("until", ["capture", "quantize"])
def test_submodules_can_be_looked_up_where_weights_are_resident(until: str) -> None:
    one, module = compiled("sdxl"), emitted("sdxl", until=until)
    assert module.add_embedding.linear_1.in_features == one.model.add_embedding.linear_1.in_features
    assert len(module.down_blocks) == len(one.model.down_blocks) and bool(module.mid_block)
    assert module.conv_in.weight.shape == one.model.conv_in.weight.shape, "this weight is the module's own"
    with pytest.raises(AttributeError, match="no_such_layer"):
        _ = module.add_embedding.no_such_layer


@pytest.mark.parametrize(
    "name", ["graph", "history", "device", "dtype", "config", "runtime", "meta", "weights", "layer", "code"]
)
@pytest.mark.parametrize("until", ["quantize", "schedule"])
def test_a_layer_may_have_the_name_of_an_attribute_of_the_module(name: str, until: str) -> None:
    model = Function(lambda m, x: getattr(m, name)(x), **{name: nn.Linear(4, 4)})
    x = torch.randn(3, 4)
    slab = make_slab(model, (x,))
    module = squareq_fx.compile(model, slab, until=until, progress=False)
    assert l2(module(x), dequantized(model, slab)(x)) < 1e-5
    assert module.device == torch.device("cpu") and isinstance(module.graph, fx.Graph)
    assert module.dtype == torch.float32 and module.history[0].name == "capture"


def test_the_model_is_not_changed(toy: _Toy) -> None:
    before = _state(toy.model)
    training = toy.model.training
    module = toy.compile()
    module(**toy.call)
    module.shutdown()
    assert _state(toy.model) == before and toy.model.training == training


def test_readable_printouts(capsys: pytest.CaptureFixture[str], streamed: CompiledModule) -> None:
    streamed.print_readable()
    assert "squareq.load.default('blocks.0'" in capsys.readouterr().out.replace("ops.squareq", "squareq")
    assert "prefetch" in streamed.code and "def forward" in streamed.code
    text = squareq_fx.show(streamed)
    functions = [name for name, child in streamed.named_children() if isinstance(child, fx.GraphModule)]
    assert functions and all(f"def {name}(" in text for name in (*functions, "forward"))


@pytest.mark.parametrize("until", ["capture", "quantize", "outline", "stream", "schedule"])
def test_the_text_of_show_runs(until: str, toy: _Toy) -> None:
    module = toy.emit(until)
    namespace: dict[str, Any] = {}
    exec(compile(squareq_fx.show(module), "<show>", "exec"), namespace)
    inputs = [toy.call[path] for path in module._binding.call.input_paths]
    state = [module] if any(n.op == "get_attr" for n in module.graph.nodes) else []
    with torch.no_grad():
        if module.runtime is None:
            (found,) = namespace["forward"](*state, *inputs)
        else:
            with module.runtime.step(), ops.activate(module.runtime):
                (found,) = namespace["forward"](*state, *inputs)
    assert torch.equal(found, module(**toy.call))
    module.shutdown()


@pytest.mark.parametrize("family", _FAMILIES)
def test_show_and_draw_of_a_backbone(family: str) -> None:
    module = compiled(family).module
    compile(squareq_fx.show(module), "<show>", "exec")
    picture = ElementTree.fromstring(squareq_fx.draw(module))
    assert picture.tag == "{http://www.w3.org/2000/svg}svg" and len(list(picture.iter())) > 50
    for stage in module.history:
        ElementTree.fromstring(squareq_fx.draw(stage.graph))


# --------------------------------------------------------------------------------- nothing spoils it (gate 14)


_CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to dtype": lambda m: m.to(torch.float16),
    "to dtype=": lambda m: m.to(dtype=torch.bfloat16),
    "to both": lambda m: m.to("cpu", torch.float16),
    "parent half": lambda m: nn.Sequential(m).half(),
    "parent to": lambda m: nn.ModuleDict({"unet": m}).to(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("until", ["schedule", "quantize"])
@pytest.mark.parametrize("cast", _CASTS)
def test_gate14_casts_change_nothing_and_warn(cast: str, until: str) -> None:
    """A streamed module's weights are the slab's bytes, the other's are parameters and buffers."""
    module, call, slab = emitted("sdxl", until), calls("sdxl", 2), family_slab("sdxl")
    before, held, expected = _state(module), bits(slab.data), module(**call).sample
    assert bool(before) == (until == "quantize")
    with pytest.warns(UserWarning, match=r"keeps computing in torch\.float32.*compile again"):
        _CASTS[cast](module)
    assert _state(module) == before and bits(slab.data) == held
    assert module.dtype == torch.float32
    found = module(**call).sample
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("until", ["schedule", "quantize"])
def test_gate14_a_cast_to_what_it_is_says_nothing(until: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emitted("sdxl", until).float().to("cpu").to(torch.float32).eval().requires_grad_(False)


def test_another_device_is_refused(streamed: CompiledModule, toy: _Toy) -> None:
    expected = streamed(**toy.call)
    with pytest.raises(RuntimeStateError, match=r"compiled for cpu; compile again with device='meta'"):
        streamed.to("meta")
    assert torch.equal(streamed(**toy.call), expected)


@pytest.mark.parametrize("until", ["schedule", "quantize"])
def test_copies_and_pickles_are_refused(until: str, toy: _Toy) -> None:
    module = toy.emit(until)
    with pytest.raises(RuntimeStateError, match="cannot be copied; compile the model again"):
        copy.deepcopy(module)
    with pytest.raises(RuntimeStateError, match="cannot be copied"):
        copy.deepcopy(nn.Sequential(module))
    with pytest.raises(RuntimeStateError, match="cannot be pickled; keep the slab"):
        pickle.dumps(module)
    with pytest.raises(RuntimeStateError, match="cannot be pickled"):
        torch.save(module, io.BytesIO())
    module.shutdown()


# --------------------------------------------------------------------------------------------------- life


def test_shutdown_twice_and_then_a_call(toy: _Toy) -> None:
    module = toy.emit()
    module(**toy.call)
    module.shutdown()
    module.shutdown()
    with pytest.raises(RuntimeStateError, match="was shut down; compile the module again"):
        module(**toy.call)


@pytest.mark.parametrize("backing", ["host", "disk", "resident"])
@pytest.mark.parametrize("at", [0, 4, 9])
def test_an_exception_inside_a_step_leaves_the_module_usable(
    backing: str, at: int, toy: _Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    import squareq_fx.kernels.dispatch as dispatch

    module = toy.emit(backing=backing)
    expected = module(**toy.call)
    remaining = iter(range(at, -1, -1))
    working = dispatch.run_int8_linear

    def fails(*args: Any) -> torch.Tensor:
        if next(remaining) == 0:
            raise FloatingPointError("in the middle of a block")
        return working(*args)

    with monkeypatch.context() as patched, pytest.raises(FloatingPointError, match="middle of a block"):
        patched.setattr(dispatch, "run_int8_linear", fails)
        module(**toy.call)
    for _ in range(2):
        assert torch.equal(module(**toy.call), expected)
    module.shutdown()


def test_a_refused_call_leaves_the_module_usable(toy: _Toy, streamed: CompiledModule) -> None:
    expected = streamed(**toy.call)
    with pytest.raises(BindingError):
        streamed(x=toy.call["x"])
    assert torch.equal(streamed(**toy.call), expected)


def test_two_modules_share_one_slab(toy: _Toy) -> None:
    first, second = toy.emit(), toy.emit(keep_resident=["blocks.1"])
    assert first.runtime is not None and second.runtime is not None
    assert first.runtime.store.data.data_ptr() == second.runtime.store.data.data_ptr() == toy.slab.data.data_ptr()
    for _ in range(3):
        assert torch.equal(first(**toy.call), second(**toy.call))
    first.shutdown()
    assert torch.equal(second(**toy.call), toy.emit("quantize")(**toy.call))
    second.shutdown()


def test_keep_resident(toy: _Toy, streamed: CompiledModule) -> None:
    streamed(**toy.call)
    module = toy.emit(keep_resident=["blocks.0", "blocks.2"])
    assert torch.equal(module(**toy.call), streamed(**toy.call))
    everything = streamed.last_step
    assert everything is not None and module.runtime is not None
    kept = sum(module.runtime.store.segments[name].nbytes for name in ("blocks.0", "blocks.2"))
    module(**toy.call)  # the first call filled them
    assert module.last_step is not None
    assert module.last_step.bytes_to_device == everything.bytes_to_device - kept
    module.shutdown()
    with pytest.raises(RuntimeStateError, match=r"blocks\.7"):
        toy.emit(keep_resident=["blocks.7"])


def test_last_step_is_there_after_the_first_call_only(toy: _Toy) -> None:
    module = toy.emit()
    assert module.last_step is None
    module(**toy.call)
    assert module.last_step is not None and module.last_step.loads == module.last_step.evictions > 0
    module.shutdown()
    assert toy.emit("quantize").last_step is None


# ----------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is refused up front is refused before the model is traced, which takes half a minute for a large one."""

    def traced(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was traced before the mistake was noticed")

    monkeypatch.setattr(torch.export, "export", traced)
    yield


def test_a_slab_of_other_weights(toy: _Toy, no_capture: None) -> None:
    other = copy.deepcopy(toy.model)
    with torch.no_grad():
        other.head.weight.mul_(2)
        other.blocks[1].body.inner.up.weight.neg_()
    with pytest.raises(SlabError, match=r"was built from other weights than the model now holds \(2 of \d+ layers") as raised:
        squareq_fx.compile(other, toy.slab, progress=False)
    assert {"head", "blocks.1.body.inner.up"} == set(raised.value.problems)


def test_a_slab_of_another_model(no_capture: None) -> None:
    with pytest.raises(SlabError, match=r"from another model: its signature is [0-9a-f]{16}.*that of UNet2DConditionModel is"):
        squareq_fx.compile(backbone("sdxl"), family_slab("flux"), progress=False)


def test_weights_that_are_nowhere(toy: _Toy, no_capture: None) -> None:
    bare = skeleton(backbone("flux"))[0]
    slab = squareq_fx.build_slab(backbone("flux"), scratch("bare"), passthrough=False, progress=False)
    with pytest.raises(SlabError, match=r"the model holds \d+ weights on 'meta' and bare.*passthrough=True"):
        squareq_fx.compile(bare, slab, progress=False)


def test_a_path_without_a_slab(toy: _Toy, no_capture: None) -> None:
    with pytest.raises(SlabError, match="nothing_here"):
        squareq_fx.compile(toy.model, scratch("nothing_here"), progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(toy: _Toy, no_capture: None) -> None:
    with pytest.raises(CaptureError, match=r"device='cuda', but torch sees no CUDA device here; leave device out"):
        toy.compile(device="cuda")


def test_a_backing_that_is_none(toy: _Toy, no_capture: None) -> None:
    with pytest.raises(SquareQError, match=r"backing='floppy' is none of resident, host, disk"):
        toy.compile(backing="floppy")


def test_a_model_that_nobody_knows_how_to_call(no_capture: None) -> None:
    model = TinyNet()
    with pytest.raises(CaptureError, match=r"not known what to call TinyNet\(x.*pass example_inputs="):
        squareq_fx.compile(model, make_slab(model), progress=False)


@pytest.mark.parametrize("until", ["schedule", "quantize"])
def test_a_gradient_is_never_lost_silently(until: str, toy: _Toy) -> None:
    module = toy.emit(until)
    call = {**toy.call, "x": toy.call["x"].clone().requires_grad_()}
    with pytest.raises(RuntimeStateError, match=r"requires grad.*torch\.no_grad\(\), or detach its inputs"):
        module(**call)
    with torch.no_grad():
        assert torch.equal(module(**call), module(**toy.call))
    with torch.inference_mode():
        assert torch.equal(module(**call), module(**toy.call))
    assert not module(**toy.call).requires_grad
    module.shutdown()


def test_a_gradient_that_meets_no_int8_layer_is_refused_too() -> None:
    """Autograd would keep the convolution's weight, whose bytes are another block's by the time of the backward."""

    class Convolving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 3, padding=1)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)])
            self.eval().requires_grad_(False)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            for block in self.blocks:
                y = block(y)
            return self.conv(x), y

    model, example = Convolving(), (torch.randn(2, 3, 4), torch.randn(2, 4))
    module = squareq_fx.compile(model, make_slab(model, example), progress=False)
    with pytest.raises(RuntimeStateError, match="an input requires grad"):
        module(example[0].clone().requires_grad_(), example[1])
    assert torch.equal(module(*example)[0], model(*example)[0])


def test_gate12_poisoned_arena_gives_the_same_bits() -> None:
    """A use after evict would read 0xAB."""
    one: Compiled = compiled("flux")
    module, call = one.module, calls("flux", 2)
    assert module.runtime is not None
    expected, original = module(**call).sample, module.runtime
    try:
        module.runtime = Runtime(original.store, arena_bytes=original.arena_bytes, poison=True)
        assert torch.equal(module(**call).sample, expected)
        module.runtime.shutdown()
    finally:
        module.runtime = original


def test_units() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30)] == [
        "0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5.00 GiB"]  # fmt: skip
    assert [format_seconds(s) for s in (0.0123, 3.21)] == ["12 ms", "3.2 s"]
