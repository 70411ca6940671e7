"""A program of TorchInductor taken out of its wrappings, so that it can be kept, and run without them.

`standalone_compile` returns the program inside AOTAutograd's run-time wrappers, and loading such an artifact again imports the
whole compiler. The functions here need none of that: they change no input, are run without gradients, and what they return has
the order and number of the graph's outputs. `portable` makes sure of it; a program that needs a wrapper is left in it.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import os
import pickle
import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from squareq_fx.stored.code import StoredCode
from squareq_fx.stored.errors import DamagedError

__all__ = ["ERRORS", "Loaded", "load", "portable", "tuned"]

_LOG = logging.getLogger(__name__)
_IMPORT = re.compile(r"^from torch\._inductor\.[\w.]+ import (?:\w+ as )?(\w+)\n", re.MULTILINE)
"""A line at the top of every program; those of `extern_kernels` and `align`, which few use, load the whole compiler."""
ERRORS = (
    *(LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, ArithmeticError, NameError),
    *(ImportError, SyntaxError, OSError, EOFError, pickle.UnpicklingError),
)
"""What a text may raise where its surroundings are not those it was made in; a compiler's errors are RuntimeErrors."""
_PLAIN = {"non_alias", "unsafe_view_alias", "custom_function_view", "alias_of_input", "is_input"}
"""How an output may be related to others: without gradients these are what the program itself returns."""


def portable(artifact: Any, fixed: tuple[int, ...], condition: str) -> StoredCode | None:
    """What to keep of a program; None if it needs what is not kept.

    Args:
        artifact: what `standalone_compile` returned; it holds what Inductor writes into its own cache, pickled.
        fixed, condition: of `Compilation`.
    """
    try:
        return _taken_out(artifact, fixed, condition)
    except ERRORS as error:  # an Inductor that has these things elsewhere
        _LOG.warning("a program of Inductor is left in its wrappers: %s: %s", type(error).__name__, error)
        return None


def _taken_out(artifact: Any, fixed: tuple[int, ...], condition: str) -> StoredCode | None:
    from torch.compiler._cache import CacheArtifactManager

    data = getattr(artifact, "_artifacts", None)
    found = CacheArtifactManager.deserialize(data[0]) if data else None
    entries = [(found or {}).get(kind, []) for kind in ("inductor", "aot_autograd")]
    if [len(entry) for entry in entries] != [1, 1]:
        return None
    contents = [entry[0].content for entry in entries]
    program, wrappers = map(pickle.loads, contents)
    if not (_is_plain(program) and _needs_no_wrapper(wrappers)):
        return None
    names = sorted(set(re.findall(r"\bextern_kernels\.(\w+)", program.source_code)))
    ours = [name for name in names if _of_inductor(name) is getattr(torch, name, None)]
    return StoredCode(
        source=_without_idle_imports(program.source_code),
        ours=tuple(ours),
        theirs=tuple(name for name in names if name not in ours),
        # A newer Inductor writes these copies into the program.
        aligned=() if getattr(program, "_defers_input_alignment", False) else tuple(program.inputs_to_check),
        fixed=fixed,
        condition=condition,
        kernels=_kernels(program._triton_bundle),
    )


def _is_plain(program: Any) -> bool:
    """Whether a `CompiledFxGraph` is its text and its kernels, and nothing else."""
    held = [program.constants, program.frozen_param_names, program.torchbind_constants, program.mutated_input_idxs]
    held += [getattr(program, name, None) for name in ("opaque_value_type_classes", "_wrap_compiled_regions")]
    return bool(program.source_code) and not any(held)


def _needs_no_wrapper(entry: Any) -> bool:
    """Whether AOTAutograd's wrappers around a program return what the program returns, for what they were called with."""
    meta = entry.runtime_metadata
    changes = [entry.compiled_bw, entry.maybe_subclass_meta, meta.num_mutated_inp_runtime_indices, meta.num_intermediate_bases]
    changes += [meta.tokens, meta.is_rng_op_functionalized]
    changes += [getattr(wrapper, "needs_post_compile", True) for wrapper in entry.dispatch_wrappers]
    return not any(changes) and all(output.output_type.name in _PLAIN for output in meta.output_info)


def _kernels(bundle: Any, fastest: Container[str] = ()) -> bytes:
    """The compiled Triton kernels, each once, and of those that were tuned the fastest variant only.

    Inductor bundles every variant. It writes what the tuning found into its cache, under a path of the process, and where that
    is gone the first call of each process would load the compiler, tune again, and could choose, and round, otherwise.

    Args:
        fastest: hashes of the variants that were found to be the fastest of their kernel.
    """
    if bundle is None or not (bundle.kernel_artifacts or bundle.static_autotuners):
        return b""
    kernels = {one.cache_key: one for one in bundle.static_autotuners}
    slower = {_hash(variant) for one in bundle.static_autotuners for variant in one.kernel.compile_results}
    for one in kernels.values():
        found = [variant for variant in one.kernel.compile_results if _hash(variant) in fastest]
        if len(found) == 1:
            one.kernel.compile_results = found
        slower -= {_hash(variant) for variant in one.kernel.compile_results}
    files = {one.kernel_hash: one for one in bundle.kernel_artifacts if one.kernel_hash not in slower}
    return pickle.dumps(replace(bundle, kernel_artifacts=[*files.values()], static_autotuners=[*kernels.values()]))


def _hash(variant: Any) -> str:
    from torch._inductor.runtime.runtime_utils import triton_hash_to_path_key

    key: str = triton_hash_to_path_key(variant.kernel.hash)
    return key


def _without_idle_imports(source: str) -> str:
    """The text without imports of what it does not mention again, and of `extern_kernels`, which `load` gives it."""

    def needed(line: re.Match[str]) -> str:
        mentioned = len(re.findall(rf"\b{line[1]}\b", source))
        return line[0] if line[1] != "extern_kernels" and mentioned > 1 else ""

    return _IMPORT.sub(needed, source)


@dataclass(frozen=True)
class Loaded:
    """A program that can be called.

    Attributes:
        run: takes its inputs one by one.
        untuned: its Triton kernels, if any is kept in several variants; after the first call `tuned` asks them for the fastest.
    """

    run: Callable[..., Any]
    untuned: tuple[Any, ...] = ()


def load(code: StoredCode, name: str) -> Loaded:
    """Execute the text of a program.

    What it compiled lies in Inductor's and Triton's own caches, or in `code.kernels`; what is in neither is compiled again.

    Args:
        name: for tracebacks.

    Raises:
        DamagedError: the text cannot be executed here.
    """
    try:
        return _loaded(code, name)
    except ERRORS as error:
        raise DamagedError(f"it cannot be executed here: {type(error).__name__}: {error}") from error


def _loaded(code: StoredCode, name: str) -> Loaded:
    found = {one: getattr(torch, one) for one in code.ours} | {one: _of_inductor(one) for one in code.theirs}
    path = f"<squareq_fx program {name}>"
    space: dict[str, Any] = {"__name__": f"squareq_fx_program_{name}", "__file__": path, "extern_kernels": _Functions(found)}
    with _emitted(code.kernels) as several:
        exec(compile(code.source, path, "exec", dont_inherit=True), space)
    linecache.cache[path] = (len(code.source), None, code.source.splitlines(keepends=True), path)
    call = space["call"]
    if code.aligned:
        from torch._inductor.utils import align_inputs_from_check_idxs
        from torch.utils._ordered_set import OrderedSet

        call = align_inputs_from_check_idxs(call, code.aligned, OrderedSet())

    def run(*inputs: Any) -> Any:
        with torch.no_grad():
            return call([*inputs])

    # Also those with one launcher: Inductor's own cache, which may not be there the next time, can have known the fastest.
    return Loaded(run, tuple(value for value in space.values() if _launchers(value)) if several else ())


def _launchers(value: Any) -> list[Any]:
    """The ways a Triton kernel of a program's text has to run, one once it was measured; of anything else none."""
    found = getattr(value, "launchers", None)
    return found if isinstance(found, list) else []


def tuned(code: StoredCode, untuned: Iterable[Any]) -> StoredCode | None:
    """The program with only the fastest variant of each kernel that a call has measured; None if it would be the same.

    Args:
        untuned: of the `Loaded` that was called.
    """
    try:
        return _narrowed(code, untuned)
    except ERRORS as error:  # an Inductor that has these things elsewhere; the call itself went well
        _LOG.warning("what a call measured of Inductor's kernels is not kept: %s: %s", type(error).__name__, error)
        return None


def _narrowed(code: StoredCode, untuned: Iterable[Any]) -> StoredCode | None:
    single = [launchers[0] for launchers in map(_launchers, untuned) if len(launchers) == 1]
    fastest: set[str] = {getattr(launcher, "cache_hash", "") for launcher in single}
    bundle = pickle.loads(code.kernels) if code.kernels and fastest else None
    known = {_hash(variant) for variants in _several(bundle) for variant in variants}
    return replace(code, kernels=_kernels(bundle, fastest & known)) if fastest & known else None


def _several(bundle: Any) -> list[list[Any]]:
    """The variants of each kernel of a bundle that has more than one."""
    every = [one.kernel.compile_results for one in getattr(bundle, "static_autotuners", ())]
    return [variants for variants in every if len(variants) > 1]


@contextlib.contextmanager
def _emitted(kernels: bytes) -> Iterator[bool]:
    """While this is entered a program's text finds its compiled kernels, and starts no processes to compile them.

    Gives whether any kernel has several variants.
    """
    if not kernels:
        yield False
        return
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from torch._inductor.triton_bundler import TritonBundler
    from torch.utils._triton import triton_hash_with_backend

    bundle = pickle.loads(kernels)
    ready = {_hash(variant) for one in bundle.static_autotuners for variant in one.kernel.compile_results}
    if any(files.kernel_hash not in ready for files in bundle.kernel_artifacts):
        triton_hash_with_backend()  # as Inductor before it names other tools to Triton: these files' names begin with it
    for files in bundle.kernel_artifacts[:1]:  # as Inductor where it makes a kernel: kernels of our own are found there too
        os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(files.device))
    several = bool(_several(bundle))  # before Inductor, where its own cache knows the fastest, drops the others
    TritonBundler.read_and_emit(bundle)
    with config.patch(compile_threads=1):
        yield several


class _Functions:
    """What the text knows as `extern_kernels`."""

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        self.__dict__.update(functions)


def _of_inductor(name: str) -> Callable[..., Any]:
    from torch._inductor.select_algorithm import extern_kernels  # late: loads the compiler

    found: Callable[..., Any] = getattr(extern_kernels, name)
    return found
