"""Graphs on disk, so that a second process compiles the same model without tracing it.

A graph's key is a hash of everything it was made from (`program_key`); whatever changes gives another key, and nothing is ever
brought up to date. An entry is two files (`squareq_fx.stored`): the graph after the passes, and the stages before it, which are
read when someone asks for one. Files are put in place whole, so processes may share a folder; one that is damaged is replaced.

Types are not inferred again when a graph is read. When it is written, it is read back and compared with what was checked, type
by type, and its checksum says that it still is that. The rules of `verify` that need no inference are applied again.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from squareq_fx.compute import slab_id
from squareq_fx.durable import write_whole
from squareq_fx.errors import SquareQError
from squareq_fx.ir import functions, info, program
from squareq_fx.slab.reader import Slab
from squareq_fx.specs import spec
from squareq_fx.stored import DamagedError, UnstorableError, read_program, write_program
from squareq_fx.stored.folder import LIMIT_BYTES, folder_of, prune
from squareq_fx.stored.identity import NoIdentityError, identity
from squareq_fx.stored.surroundings import libraries, versions
from squareq_fx.verify import check_lint, check_operations, check_residency

__all__ = ["LIMIT_BYTES", "ProgramCache", "program_key"]


def program_key(
    model: nn.Module,
    slab: Slab,
    passes: Iterable[Any],
    *,
    example_inputs: Any = None,
    device: torch.device | str | None = None,
    block_pattern: str | None = None,
    until: str | None = None,
) -> str:
    """The key of what `capture` and these passes make: a hash of the model's modules, their attributes and source, names, sizes
    and types of its weights (not their values), the slab, the inputs' sizes, every option, this package's source, and the
    versions of Python, torch and the device.

    Raises:
        NoIdentityError: the model or a pass holds something that cannot be looked into.
    """
    first = next((p.device.type for p in model.parameters()), "cpu")
    where = _device(device, first)
    options = (str(where), block_pattern, until, tuple(passes))
    text = functools.cache(_slab_text)  # the passes hold the slab too

    def stands_for(value: Any) -> str | None:
        return text(value) if isinstance(value, Slab) else None

    return identity((versions(where), libraries(), text(slab), model, example_inputs, options), stands_for)


class ProgramCache:
    """A folder of graphs.

    Args:
        folder: made when the first graph is kept.
        limit: most bytes of all entries.
    """

    def __init__(self, folder: Path, limit: int = LIMIT_BYTES) -> None:
        self.folder = folder
        self._limit = limit

    @classmethod
    def of(cls, cache: bool | str | os.PathLike[str]) -> ProgramCache | None:
        """The one of `folder_of(cache)`."""
        folder = folder_of(cache)
        return None if folder is None else cls(folder)

    def get(
        self, key: Callable[[], str], model: nn.Module, make: Callable[[], fx.GraphModule]
    ) -> tuple[fx.GraphModule, bool]:
        """The graph of this key, read if it is there, else made and kept; and whether it was read.

        A graph that cannot be read or kept is made, with a warning.

        Args:
            key: see `program_key`.
            model: the model it is of; the signature and tensors that are plain attributes are taken from it.
        """
        try:
            name = key()
        except NoIdentityError as error:
            _warn(f"the compiled graph is not kept, because what it depends on holds {error}")
            return make(), False
        found = self._read(name, model)
        if found is not None:
            return found, True
        made = make()
        self._write(name, made, model)
        return made, False

    def _read(self, name: str, model: nn.Module) -> fx.GraphModule | None:
        path, earlier = self._paths(name)
        try:
            gm = read_program(path.read_bytes(), model, earlier.read_bytes)
            _check(gm)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, SquareQError) as error:
            _warn(f"the compiled graph kept in {path} cannot be used and is made again: {error}")
            return None
        return gm

    def _write(self, name: str, gm: fx.GraphModule, model: nn.Module) -> None:
        path, earlier = self._paths(name)
        try:
            last, before = write_program(gm, model)
            _same(gm, read_program(last, model, lambda: before))
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(earlier, before)
            write_whole(path, last)
            prune(self.folder, self._limit, keep=name)
        except (OSError, UnstorableError, DamagedError) as error:
            _warn(f"the compiled graph is not kept: {error}")

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.graph", self.folder / f"{name}.stages"


def _warn(text: str) -> None:
    warnings.warn(f"{text}. cache=False compiles without the cache", stacklevel=5)


def _check(gm: fx.GraphModule) -> None:
    """The rules of `verify` that infer nothing."""
    for name, graph in (("", gm), *functions(gm).items()):
        check_lint(graph, name)
        check_operations(graph, program(gm).level, name)
    check_residency(gm)


def _same(gm: fx.GraphModule, other: fx.GraphModule) -> None:
    """Raises UnstorableError if a graph is not read as what it was written from."""
    children, others = functions(gm), functions(other)
    if list(children) != list(others):
        raise UnstorableError("its functions are not read as they were written")
    for a, b in zip(gm.graph.nodes, other.graph.nodes, strict=True):
        if _told(a) != _told(b):
            raise UnstorableError(f"node {a.name} is not read as it was written")
    for name, child in children.items():
        _same(child, others[name])


def _told(node: fx.Node) -> tuple[Any, ...]:
    named = (node.op, node.name, str(node.target), str(node.args), str(node.kwargs), info(node))
    return (*named, spec(node.meta.get("val")), node.meta.get("stack_trace"))


def _device(device: torch.device | str | None, first: str) -> torch.device:
    found = torch.device(device) if device is not None else torch.device("cpu" if first == "meta" else first)
    if found.type == "cuda" and found.index is None and torch.cuda.is_available():
        found = torch.device("cuda", torch.cuda.current_device())
    return found


def _slab_text(slab: Slab) -> str:
    """Where everything lies in the slab, and what its checksums say."""
    tensors = [(key, e.offset, str(e.dtype), tuple(e.shape)) for key, e in slab.tensors.items()]
    recorded = (sorted(slab.aliases.items()), slab.block_paths, repr(slab.input_signature))
    return repr((slab_id(slab), slab.signature, slab.manifest.to_text(), tensors, recorded))

