"""One function of the graph, compiled by TorchInductor once for all sizes, with its weights unpacked outside.

The compiler gets a copy of the function over symbols of its own (`symbols.fresh`), so nothing it assumes reaches the graph.
What it did assume of the sizes is checked when sizes first come; those that do not satisfy it are compiled for again, which
`Lowering.compilations` tells.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx, nn
from torch.torch_version import TorchVersion

from squareq_fx import ops
from squareq_fx.collector import resumed
from squareq_fx.errors import SquareQError
from squareq_fx.inference import infer
from squareq_fx.ir import fake_mode, model_source
from squareq_fx.lowering.decompositions import decompose
from squareq_fx.lowering.kept import KeptPrograms, program_code_key
from squareq_fx.lowering.lowered import lowered, unpacker
from squareq_fx.lowering.portable import ERRORS, Loaded, load, portable, tuned
from squareq_fx.lowering.symbols import Fresh, Sizes, fresh, hint, holds, sizes_of
from squareq_fx.stored.code import StoredCode
from squareq_fx.stored.errors import DamagedError

__all__ = ["Compilation", "CompiledFunction", "compile_function"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compilation:
    """One run of the compiler.

    Attributes:
        function: which function of the graph.
        sizes: the sizes it was tuned for, one number for each independent size of the function's arguments.
        fixed: positions in `sizes` that the program holds for one value of only; others are compiled for when they come.
        condition: what else the program assumes of these sizes (`L['t0']` is the first), as text; empty for nothing.
        seconds: how long it took; a program found in a cache takes a tenth or less.
        kept: the compiler did not run: the program is one that an earlier compile kept (`lowering.kept`).
    """

    function: str
    sizes: tuple[int, ...]
    fixed: tuple[int, ...]
    condition: str
    seconds: float
    kept: bool = False


def compile_function(
    name: str,
    function: fx.GraphModule,
    note: Callable[[Compilation], None],
    value_of: Callable[[Any], int] | None = None,
    programs: KeptPrograms | None = None,
) -> nn.Module:
    """What runs in place of a function of the graph; the function is unchanged. No weight is kept.

    A function that computes nothing (views and sizes) is not compiled.

    Args:
        name: the function's, for messages.
        note: called after each run of the compiler, also of those during later calls.
        value_of: gives, for a size of the graph, the number to tune for, or KeyError if that is not known; default: what the
            graph was captured with.
        programs: where programs are read and kept; None: each is compiled.

    Raises:
        SquareQError: Inductor refuses the function, naming it and the model's source.
    """
    return CompiledFunction(name, function, note, value_of, programs) if _computes(function) else lowered(function)


class CompiledFunction(nn.Module):
    """Called as the function is; see `compile_function`."""

    def __init__(
        self,
        name: str,
        function: fx.GraphModule,
        note: Callable[[Compilation], None],
        value_of: Callable[[Any], int] | None = None,
        programs: KeptPrograms | None = None,
    ) -> None:
        super().__init__()

        def value(size: Any) -> int:
            try:
                return hint(size) if value_of is None else value_of(size)
            except KeyError:
                return hint(size)

        self._name = name
        self._note = note
        self._source = function
        self._body, self._gather, self._values = _without_unpacking(function, value)
        self._sizes: Sizes = sizes_of(self._values, value)
        self._kept = programs
        self._programs: list[_Program] = []
        self._by_sizes: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._single = not isinstance(_output(function).args[0], tuple | list)
        # Of a size that is 0 or 1 the compiler would assume that it always is.
        self._program(tuple(max(n, 2) for n in self._sizes.hints))

    def forward(self, *arguments: Any) -> Any:
        flat = self._gather(arguments)
        sizes = self._sizes.read(flat)
        run = self._by_sizes.get(sizes)
        with torch._C._AutoDispatchBelowAutograd():  # our operations then skip the step that looks for gradients they would cut
            results = self._first(sizes, flat) if run is None else run(*sizes, *flat)
        return results[0] if self._single else results

    def _first(self, sizes: tuple[int, ...], flat: Sequence[Any]) -> Any:
        """The first call with sizes. A program without its wrappers that does not run is compiled again, to run in them."""
        program = self._program(sizes)
        try:
            results = program.run(*sizes, *flat)
        except torch.OutOfMemoryError:
            raise
        except ERRORS as error:
            if program.wrapped:
                raise
            text = f"the program of {self._name} does not run here ({type(error).__name__}: {error})"
            warnings.warn(f"{text}; it is compiled again, and not kept. Please report this.", stacklevel=4)
            self._programs.remove(program)
            if self._kept is not None and program.key is not None:
                self._kept.drop(program.key)
            program = self._program(sizes, wrapped=True)
            results = program.run(*sizes, *flat)
        self._by_sizes[sizes] = program.run
        self._keep_tuned(program)
        return results

    def _keep_tuned(self, program: _Program) -> None:
        """After a program's first call: keep what it measured of its kernels, so that no other process does."""
        if not program.untuned:
            return
        faster = tuned(*program.untuned.pop())
        if faster is not None and self._kept is not None and program.key is not None:
            self._kept.put(program.key, faster)

    def _program(self, sizes: tuple[int, ...], wrapped: bool = False) -> _Program:
        """One that holds for these sizes. wrapped: from the compiler, as it comes."""
        for program in self._programs:
            if program.holds(sizes):
                return program
        start = time.perf_counter()
        key, kept = None, None
        if self._kept is not None and not wrapped:
            key = program_code_key(self._body, self._values, self._sizes, sizes, _options())
            kept = self._kept.get(key, partial(load, name=self._name)) if key is not None else None
        if kept is not None:
            program = _Program.of(*kept, key)
        else:
            with resumed():
                program = self._made(key, sizes, wrapped)
        self._programs.append(program)
        seconds = time.perf_counter() - start
        self._note(Compilation(self._name, tuple(sizes), program.fixed, program.condition, seconds, kept is not None))
        told = (self._name, "compiled" if kept is None else "found", sizes, seconds, program.condition or "anything")
        _LOG.info("%s %s for sizes %s in %.1f s, if %s", *told)
        return program

    def _made(self, key: str | None, sizes: tuple[int, ...], wrapped: bool) -> _Program:
        """The program for these sizes, from the compiler; kept under a key, if it can be."""
        world = fresh(self._sizes, sizes, self._values)
        try:
            artifact = _compiled(self._body, world)
            fixed, condition = world.fixed(), world.condition()
        except Exception as error:
            raise self._refused(error) from error
        code = None if wrapped else portable(artifact, fixed, condition)
        if code is not None:
            try:
                loaded = load(code, self._name)  # in its wrappers it also holds its serialised form, which is on disk already
            except DamagedError as error:
                _LOG.warning("%s runs in Inductor's wrappers: %s", self._name, error)
                code = None
        if code is None:
            return _Program(getattr(artifact, "_compiled_fn", artifact), fixed, condition, True, key)
        if self._kept is not None and key is not None:
            self._kept.put(key, code)
        return _Program.of(code, loaded, key)

    def _refused(self, error: Exception) -> SquareQError:
        text = str(error).strip().splitlines()
        nodes = [node for node in _calls(self._source) if not _is_free(node)]
        named = next((n for n in nodes if str(n.target) in str(error)), nodes[0])
        return SquareQError(
            f"Inductor cannot compile the function {self._name}: {type(error).__name__}: {text[0] if text else 'no message'}\n"
            f"  model source: {named.name}, {model_source(named)}\n"
            f"  raised in {_origin(error)}\n"
            '  Compile with backend="eager", or report this together with the output of TORCH_LOGS=inductor.'
        )


def _origin(error: BaseException, frames: int = 4) -> str:
    """The last frames of what an exception was raised from, innermost first."""
    while error.__cause__ is not None:
        error = error.__cause__
    stack = traceback.extract_tb(error.__traceback__)[-frames:][::-1]
    places = [f"{_short(frame.filename)}:{frame.lineno} ({frame.name}: {frame.line})" for frame in stack]
    return "\n    from ".join(places) or "no frame that is known"


def _short(path: str) -> str:
    """From the package on."""
    return path.rpartition("site-packages/")[2]


@dataclass(frozen=True)
class _Program:
    run: Callable[..., Any]
    fixed: tuple[int, ...]
    condition: str
    wrapped: bool
    key: str | None
    untuned: list[tuple[StoredCode, tuple[Any, ...]]] = field(default_factory=list)  # what `tuned` wants, until the first call

    @classmethod
    def of(cls, code: StoredCode, loaded: Loaded, key: str | None) -> _Program:
        """One out of its wrappers."""
        untuned = [(code, loaded.untuned)] if loaded.untuned else []
        return cls(loaded.run, code.fixed, code.condition, False, key, untuned)

    @cached_property
    def holds(self) -> Callable[[Sequence[int]], bool]:
        return holds(self.condition)


def _options() -> dict[str, Any]:
    """Settings of Inductor for all that is compiled here; they are part of its cache's key."""
    # 16-bit values between fused operations round, as the model's code has it.
    settings: dict[str, Any] = {"emulate_precision_casts": True}
    if torch.__version__ < TorchVersion("2.13"):
        # Its analysis compares sizes as written, b*(t1 + t2) with b*t1 + b*t2, and dies on an assertion where they differ.
        settings["triton.coalesce_tiling_analysis"] = False
    settings |= {"size_asserts": False, "alignment_asserts": False}  # types were checked after every pass
    # Triton cuts a kernel's file name off after 150 characters, which a norm and a quantisation fill; Inductor then does not
    # find the binary, launches the slow way, and compiles the kernel again in each process. With "torch" it names no operation.
    settings["triton.descriptive_names"] = "torch"
    # A reduction that takes many registers would get another variant where it is loaded, compiled and measured in each process.
    settings["dynamic_scale_rblock"] = False
    return {"config_patches": settings}


def _compiled(body: fx.Graph, world: Fresh) -> Any:
    """What `standalone_compile` returns."""
    from torch._inductor import standalone_compile
    from torch._inductor.virtualized import V

    from squareq_fx.lowering.inductor_choices import RowsInRegisters  # late: loads Inductor

    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for i in range(len(world.sizes)):
        graph.placeholder(f"size_{i}")
    for node in body.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = {}
    gm = fx.GraphModule({}, graph)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(_device(world.values).type, enabled=False))
        stack.enter_context(V.set_choices_handler(RowsInRegisters()))
        stack.enter_context(_without_range_warnings())
        stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(world.mode)))
        inputs = [*world.sizes, *world.values]
        return standalone_compile(gm, inputs, dynamic_shapes="from_tracing_context", options=_options())


@contextlib.contextmanager
def _without_range_warnings() -> Iterator[None]:
    """torch reports each size whose bounds it cannot work out, hundreds of lines for a UNet, and goes on without them."""
    logger = logging.getLogger("torch.utils._sympy.interp")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _device(values: Sequence[Any]) -> torch.device:
    return next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))


def _without_unpacking(
    function: fx.GraphModule, value_of: Callable[[Any], int]
) -> tuple[fx.Graph, Callable[[Sequence[Any]], list[Any]], list[Any]]:
    """The function with every unpacked weight an input of its own.

    Returns:
        the graph, decomposed; what makes its inputs from the function's arguments; their `val`s.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    plan: list[tuple[int, Callable[[Any], list[Any]] | None]] = []
    inputs: list[fx.Node] = []
    for position, node in enumerate(n for n in function.graph.nodes if n.op == "placeholder"):
        views = [user for user in node.users if user.target is ops.unpack]
        if views:
            plan.append((position, unpacker([view.args[1:] for view in views])))
            inputs += views
        if len(views) < len(node.users):
            plan.append((position, None))
            inputs.append(node)
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in function.graph.nodes:
        if node in env or node.op == "placeholder":
            continue
        if node.op == "output":
            results = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
            graph.output(fx.node.map_arg(list(results), env.__getitem__))
            continue
        env[node] = graph.node_copy(node, env.__getitem__)
        if "val" not in node.meta:  # made by hand, after the last pass
            env[node].meta["val"] = infer(node.target, env[node].args, env[node].kwargs, fake_mode(function))  # type: ignore[arg-type]
    decompose(graph, value_of)

    def gather(arguments: Sequence[Any]) -> list[Any]:
        flat: list[Any] = []
        for position, unpack in plan:
            if unpack is None:
                flat.append(arguments[position])
            else:
                flat += unpack(arguments[position])
        return flat

    return graph, gather, [n.meta["val"] for n in inputs]


def _computes(function: fx.GraphModule) -> bool:
    """Whether anything is left to compile without unpacking, views and sizes."""
    return any(not _is_free(node) for node in _calls(function))


def _calls(function: fx.GraphModule) -> Iterator[fx.Node]:
    return (n for n in function.graph.nodes if n.op == "call_function" and n.target is not ops.unpack)


def _is_free(node: fx.Node) -> bool:
    if "val" in node.meta and not isinstance(node.meta["val"], torch.Tensor | tuple | list):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target.is_view)
    return getattr(node.target, "__name__", "") == "getitem"


def _output(function: fx.GraphModule) -> fx.Node:
    return next(n for n in function.graph.nodes if n.op == "output")
