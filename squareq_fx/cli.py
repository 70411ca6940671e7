"""The command `squareq-fx`: build, inspect and verify slabs, and run the demo. Heavy imports wait for a
command.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from squareq_fx.errors import SlabError, SquareQError

if TYPE_CHECKING:
    from squareq_fx.compute import Decisions
    from squareq_fx.slab import Slab

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="INT8 slabs of diffusion models, streamed block by block.",
)
_out = Console()
_err = Console(stderr=True)

SlabPath = Annotated[Path, typer.Argument(help="the slab: its path without suffix, or either of its files")]


@app.command()
def build(
    source: Annotated[Path, typer.Argument(help="a save_pretrained directory, or one .safetensors file")],
    out: Annotated[Path, typer.Argument(help="where to write, without suffix")],
    model_class: Annotated[
        str | None, typer.Option(help="package.module:Class (or :function), for a file or an unknown model")
    ] = None,
    include_prefix: Annotated[
        list[str] | None, typer.Option(help="quantise only layers whose name starts with this; repeatable")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="layer name or pattern to leave as it is; repeatable")
    ] = None,
    pack_k: Annotated[int, typer.Option(help="pad rows to a multiple of this; 1 or less pads nothing")] = 64,
    block_pattern: Annotated[
        str | None, typer.Option(help="regular expression for the module paths of blocks")
    ] = None,
    passthrough: Annotated[bool, typer.Option(help="store what is not quantised too")] = True,
    architecture_id: Annotated[
        str | None, typer.Option(help="name in the manifest; the model's class by default")
    ] = None,
    progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
) -> None:
    """Quantise a checkpoint into a slab, streaming; an interrupted build goes on where it was."""
    with _clean_errors():
        from squareq_fx.slab import build_slab

        slab = build_slab(
            source,
            out,
            model_class=_load_object(model_class) if model_class else None,
            include_prefixes=include_prefix or None,
            exclude=exclude or (),
            pack_k=pack_k,
            block_pattern=block_pattern,
            passthrough=passthrough,
            architecture_id=architecture_id,
            progress=progress,
        )
        _out.print(_summary_table(slab))


@app.command()
def inspect(
    slab: SlabPath,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as one JSON object")] = False,
) -> None:
    """Show what a slab holds: segments in execution order, layers, sizes, fidelity."""
    with _clean_errors():
        from squareq_fx.slab import open_slab

        with open_slab(slab) as opened:
            if as_json:
                typer.echo(json.dumps(_as_json(opened), indent=2))
                return
            _out.print(_summary_table(opened))
            if opened.segments:
                _out.print(_segment_table(opened))
            _out.print(_layer_table(opened))
            decisions = _decisions(opened)
            if decisions is not None:
                _out.print(_decision_table(decisions, opened))


@app.command()
def verify(
    slab: SlabPath,
    progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
) -> None:
    """Validate a slab and compare every tensor with its checksum; exit code 1 and a list if anything is
    wrong.
    """
    with _clean_errors():
        from squareq_fx.slab import open_slab
        from squareq_fx.slab.progress import byte_bar

        with open_slab(slab) as opened:
            problems: list[str] = []
            total = sum(segment.nbytes for segment in opened.segments)
            with byte_bar(total, f"verifying {opened.path.name}", progress) as advance:
                for segment in opened.segments:
                    try:
                        opened.verify_segment(segment.tensors)
                    except SlabError as error:
                        problems += error.problems
                    advance(segment.nbytes)
            if problems:
                raise SlabError(f"slab {opened.path} is corrupt: copy or build it again", problems)
            if opened.segments:
                typer.echo(f"{opened.path}: all {len(opened.tensors)} tensors match their checksums")
            else:
                typer.echo(f"{opened.path}: valid; it holds no checksums (not built by squareq-fx)")


@app.command()
def demo(
    output: Annotated[Path, typer.Argument(help="directory for the report")] = Path("squareq_fx_demo"),
    open_browser: Annotated[bool, typer.Option("--open", help="open the report when it is done")] = False,
    compute: Annotated[str, typer.Option(help="how the streamed model multiplies: w8a16, w8a8 or auto")] = "w8a16",
) -> None:
    """Compress, stream and sample a small trained model, and write a report to look at."""
    with _clean_errors():
        from squareq_fx.demo.run import run_demo

        typer.echo(f"report: {run_demo(output, open_browser=open_browser, compute=compute)}")


@contextmanager
def _clean_errors() -> Iterator[None]:
    try:
        yield
    except SquareQError as error:
        _err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _load_object(spec: str) -> Any:
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SlabError(f"--model-class {spec!r} must be package.module:Class: {error}") from error


def _summary_table(slab: Slab) -> Table:
    table = Table(title=escape(str(slab.path)), show_header=False)
    nbytes = sum(entry.nbytes for entry in slab.tensors.values())
    for name, value in (
        ("architecture", slab.manifest.architecture_id),
        ("signature", slab.signature),
        ("quantised layers", str(len(slab.layers))),
        ("passthrough tensors", str(len(slab.passthrough))),
        ("aliases", str(len(slab.aliases))),
        ("blocks", str(len(slab.block_paths))),
        ("segments", str(len(slab.segments))),
        ("bytes", f"{_size(nbytes)}, of them int8 {_size(slab.manifest.total_qweight_bytes)}"),
        ("input signature", "recorded" if slab.input_signature is not None else "none"),
    ):
        table.add_row(name, escape(value))
    return table


def _segment_table(slab: Slab) -> Table:
    table = Table("segment", title="segments in execution order")
    for column in ("tensors", "offset", "size"):
        table.add_column(column, justify="right")
    for segment in slab.segments:
        tensors, offset = str(len(segment.tensors)), str(segment.offset)
        table.add_row(escape(segment.name), tensors, offset, _size(segment.nbytes))
    return table


def _layer_table(slab: Slab) -> Table:
    table = Table("layer", title="quantised layers")
    for column in ("out x in", "bias", "size", "cosine", "relative L2"):
        table.add_column(column, justify="right")
    for name, layer in slab.layers.items():
        cosine, relative = slab.fidelity.get(name, (None, None))
        table.add_row(
            escape(name),
            f"{layer.orig_shape[0]} x {layer.orig_shape[1]}",
            "yes" if layer.bias_key else "",
            _size(sum(slab.tensors[key].nbytes for key in layer.keys)),
            "" if cosine is None else f"{cosine:.6f}",
            "" if relative is None else f"{relative:.5f}",
        )
    return table


def _decisions(slab: Slab) -> Decisions | None:
    """What `compute="auto"` decided for the slab, if that lies beside it; an error if it is another slab's or damaged."""
    from squareq_fx.compute import Decisions

    path = Decisions.path_beside(slab)
    if not path.exists():
        return None
    found = Decisions.load(path)
    found.check_slab(slab)
    return found


def _decision_table(decisions: Decisions, slab: Slab) -> Table:
    from squareq_fx.views.explain import decision_rows

    shapes = {name: f"{layer.orig_shape[0]} x {layer.orig_shape[1]}" for name, layer in slab.layers.items()}
    head, *rows = decision_rows(dict(decisions.layers), shapes, slab.block_paths)
    table = Table(title=escape(decisions.notes[0]))
    for i, column in enumerate(head):
        table.add_column(column, justify="left" if i in (0, 4, 8) else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _as_json(slab: Slab) -> dict[str, Any]:
    decisions = _decisions(slab)
    return {
        "path": str(slab.path),
        "architecture_id": slab.manifest.architecture_id,
        "signature": slab.signature,
        "block_paths": list(slab.block_paths),
        "input_signature": slab.input_signature,
        "aliases": dict(slab.aliases),
        "layers": {
            name: {
                "shape": list(layer.orig_shape),
                "bias": layer.bias_key is not None,
                "nbytes": sum(slab.tensors[key].nbytes for key in layer.keys),
                "fidelity": dict(zip(("cosine", "relative_l2"), slab.fidelity.get(name, ()))) or None,
            }
            for name, layer in slab.layers.items()
        },
        "passthrough": {
            key: {"dtype": str(entry.dtype).removeprefix("torch."), "shape": list(entry.shape)}
            for key, entry in slab.passthrough.items()
        },
        "compute": None if decisions is None else {name: asdict(entry) for name, entry in decisions.layers.items()},
        "segments": [
            {"name": s.name, "offset": s.offset, "nbytes": s.nbytes, "tensors": list(s.tensors)}
            for s in slab.segments
        ],
    }


def _size(nbytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"
