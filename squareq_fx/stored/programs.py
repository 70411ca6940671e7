"""A graph after the passes, with its record and history, as two strings of bytes.

The first holds the last stage and is all a run needs; the second the earlier stages, which are read when someone asks for one.
Both begin with a line that names the format and the SHA-256 of what follows, so damage is seen before anything is believed.
Tensors lie in safetensors, everything else is JSON: reading builds graphs and records of known kinds and runs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import zlib
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import fx, nn

from squareq_fx.errors import SquareQError
from squareq_fx.ir import CallSpec, Program, Stage, fake_mode, program, set_program
from squareq_fx.stored.errors import DamagedError, UnstorableError
from squareq_fx.stored.expressions import Symbols
from squareq_fx.stored.graphs import GraphReader, GraphWriter
from squareq_fx.stored.values import ValueReader, ValueWriter, decode_tree, encode_tree
from squareq_fx.tracing.skeleton import plain_tensors

__all__ = ["StoredStage", "read_program", "write_program"]

_MAGIC = "squareq_fx graph 1"
_ERRORS = (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, ArithmeticError)
"""What building a graph from a document that is none may raise, in torch and sympy too."""
_SEPARATE = {"call", "constants", "guards", "history"}


class StoredStage(Stage):
    """A stage whose graph is read when it is asked for.

    Raises:
        SquareQError: on reading `graph`, if the file of the earlier stages is gone or damaged.
    """

    def __init__(self, name: str, seconds: float, summary: str, read: Callable[[], fx.GraphModule]) -> None:
        for key, value in (("name", name), ("seconds", seconds), ("summary", summary), ("_read", read), ("_graph", None)):
            object.__setattr__(self, key, value)

    @property
    def graph(self) -> fx.GraphModule:  # type: ignore[override]
        if self._graph is None:  # type: ignore[attr-defined]
            object.__setattr__(self, "_graph", self._read())  # type: ignore[attr-defined]
        return self._graph  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"StoredStage({self.name!r}, {self.seconds:.2f} s, {self.summary!r})"


def write_program(gm: fx.GraphModule, model: nn.Module) -> tuple[bytes, bytes]:
    """The last stage, and the earlier ones.

    Args:
        gm: what `pipeline.run` returned.
        model: what was captured; its own tensors are named, not written.

    Raises:
        UnstorableError: the graph holds what cannot be written.
    """
    record = program(gm)
    values = ValueWriter(fake_mode(gm))
    *before, last = record.history or (Stage("capture", gm, 0.0, ""),)
    if last.graph is not gm:
        raise UnstorableError("the history does not end with the graph itself")
    stages = GraphWriter(values)
    earlier = {"stages": [_graph(stage.graph, stages, values) for stage in before]}
    earlier_tables = {**stages.tables(), "types": list(values.types)}
    writer = GraphWriter(values)
    constants, own = _constants(record, model)
    document = {
        "graph": _graph(gm, writer, values),
        "history": [[s.name, s.seconds, s.summary] for s in record.history],
        "constants_of_model": own,
        "call": _call(record.call, values),
        "guards": [values.expression(guard) for guard in record.guards],
    }
    document |= {"conditions": values.conditions(), "symbols": list(values.symbols.values()), "tables": writer.tables()}
    return _sealed(document, constants), _sealed({**earlier, "tables": earlier_tables}, {})


def read_program(data: bytes, model: nn.Module, earlier: Callable[[], bytes]) -> fx.GraphModule:
    """The graph that `write_program` wrote.

    Args:
        data: the first string of bytes.
        model: a model like the one that was captured.
        earlier: gives the second, when an earlier stage is asked for; may raise OSError.

    Raises:
        DamagedError: `data` is not what was written.
    """
    document, tensors = _opened(data)
    try:
        return _program(document, tensors, model, earlier)
    except _ERRORS as error:
        raise DamagedError(f"it cannot be read: {type(error).__name__}: {error}") from error


def _program(
    document: dict[str, Any], tensors: dict[str, torch.Tensor], model: nn.Module, earlier: Callable[[], bytes]
) -> fx.GraphModule:
    symbols = Symbols(document["symbols"], document["conditions"])
    reader = GraphReader(ValueReader(symbols), document["tables"])
    plain = dict(plain_tensors(model)) if document["constants_of_model"] else {}
    constants = tensors | {key: plain[key] for key in document["constants_of_model"]}
    shared: dict[str, Any] = {
        "call": _call_spec(document["call"], model, reader),
        "guards": tuple(symbols.expression(g) for g in document["guards"]),
    }
    stages: list[Stage] = []

    def read_stage(graphs: GraphReader, written: dict[str, Any], count: int) -> fx.GraphModule:
        kept = {key: constants[key] for key in written["constants"]}
        fields: dict[str, Any] = {key: graphs.value(value) for key, value in written["record"].items()}
        gm = graphs.read(written["graph"])
        return set_program(gm, Program(**fields, **shared, constants=kept, history=tuple(stages[:count])))

    @functools.cache
    def opened() -> tuple[dict[str, Any], GraphReader]:
        found, _ = _opened(earlier())
        return found, GraphReader(reader.values, found["tables"])

    def read_earlier(position: int) -> fx.GraphModule:
        try:
            found, graphs = opened()
            return read_stage(graphs, found["stages"][position], position + 1)
        except (OSError, DamagedError, *_ERRORS) as error:
            raise SquareQError(
                f"the graph after {stages[position].name} lay in a cache and cannot be read any more: {error}. Compile with "
                "cache=False to see every stage"
            ) from error

    history = document["history"]
    for i, (name, seconds, summary) in enumerate(history[:-1]):
        stages.append(StoredStage(name, seconds, summary, lambda i=i: read_earlier(i)))  # type: ignore[misc]
    gm = read_stage(reader, document["graph"], 0)
    name, seconds, summary = history[-1]
    stages.append(Stage(name, gm, seconds, summary))
    return set_program(gm, dataclasses.replace(program(gm), history=tuple(stages)))


def _graph(gm: fx.GraphModule, writer: GraphWriter, values: ValueWriter) -> dict[str, Any]:
    record = program(gm)
    fields = [f.name for f in dataclasses.fields(Program) if f.name not in _SEPARATE]
    return {
        "graph": writer.write(gm),
        "record": {name: values.write(getattr(record, name)) for name in fields},
        "constants": list(record.constants),
    }


def _constants(record: Program, model: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What must be written, and the keys of what is the model's own."""
    known = {key: value for stage in record.history for key, value in program(stage.graph).constants.items()}
    known |= record.constants
    plain = dict(plain_tensors(model)) if known else {}
    own = [key for key, value in known.items() if plain.get(key) is value]
    return {k: v.detach().cpu().clone().contiguous() for k, v in known.items() if k not in own}, own


def _call(call: CallSpec, values: ValueWriter) -> dict[str, Any]:
    """All but the signature, which is read off the model."""
    return {
        "input_paths": list(call.input_paths),
        "literals": values.write(dict(call.literals)),
        "output_leaves": values.write(call.output_leaves),
        "output_spec": encode_tree(call.output_spec, values),
    }


def _call_spec(written: dict[str, Any], model: nn.Module, reader: GraphReader) -> CallSpec:
    return CallSpec(
        signature=inspect.signature(model.forward),
        input_paths=tuple(written["input_paths"]),
        literals=reader.value(written["literals"]),
        output_leaves=reader.value(written["output_leaves"]),
        output_spec=decode_tree(written["output_spec"], reader.values),
    )


def _sealed(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    text = zlib.compress(json.dumps(document, separators=(",", ":"), allow_nan=False).encode(), 1)
    body = len(text).to_bytes(8, "little") + text + safetensors.torch.save(tensors)
    return f"{_MAGIC} {hashlib.sha256(body).hexdigest()}\n".encode() + body


def _opened(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    head, _, body = data.partition(b"\n")
    if head != f"{_MAGIC} {hashlib.sha256(body).hexdigest()}".encode():
        raise DamagedError("its checksum or its format is another")
    size = int.from_bytes(body[:8], "little")
    try:
        return json.loads(zlib.decompress(body[8 : 8 + size])), safetensors.torch.load(body[8 + size :])
    except (ValueError, zlib.error, safetensors.SafetensorError) as error:
        raise DamagedError(f"it cannot be read: {error}") from error
