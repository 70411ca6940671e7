"""Build a slab: plan it, stream it into temporary files, and only when it is complete put it in its place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from squareq_fx._version import __version__
from squareq_fx.durable import sync
from squareq_fx.errors import SlabError
from squareq_fx.slab.extras import pack_slab_header
from squareq_fx.slab.journal import Done, Journal
from squareq_fx.slab.opening import open_slab
from squareq_fx.slab.paths import SlabPaths
from squareq_fx.slab.plan import BuildPlan, CopyItem, QuantizeItem, make_plan
from squareq_fx.slab.progress import byte_bar
from squareq_fx.slab.quantizing import DataFile, copy_item, quantize_item
from squareq_fx.slab.reader import Slab
from squareq_fx.slab.skeleton import ModelClass, open_source
from squareq_fx.slab.sources import TensorSource
from squareq_fx.slab.workers import one_thread_workers

__all__ = ["build_slab"]


def build_slab(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    model_class: ModelClass | None = None,
    include_prefixes: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    pack_k: int = 64,
    block_pattern: str | None = None,
    passthrough: bool = True,
    example_inputs: Any = None,
    architecture_id: str | None = None,
    progress: bool = True,
) -> Slab:
    """Quantise a model's Linear layers into a SquareQ V2 slab and open it.

    A directory or file is streamed: the float model is never in memory. The two files appear at the end,
    whole; a build that was killed goes on where it was when it is called again, and ends with the same bytes.

    Args:
        source: a module with its weights; a directory written by `save_pretrained` (diffusers or
            transformers); or one .safetensors file, together with `model_class`.
        path: where to write, without suffix or either file's name.
        model_class: for a file or directory, a class with `from_config` (config.json lies beside the
            weights), or a function without arguments that makes the model.
        include_prefixes: quantise only layers whose name starts with one of these; None means every Linear.
        exclude: names or fnmatch patterns of Linear layers to leave in their stored dtype.
        pack_k: rows are padded with zeros to a multiple of this; 1 or less means no padding.
        block_pattern: see `block_paths`.
        passthrough: store everything that is not quantised too, so that a skeleton and the slab are the whole
            model.
        example_inputs: what the model is called with: a dict of keywords, a tuple, or a pair of both;
            recorded, and used to find the execution order. None takes those of a known diffusers family, if
            it is one.
        architecture_id: the manifest's; the class's name by default.
        progress: show a bar on a terminal.

    Returns:
        The opened slab.

    Raises:
        SlabError: everything that does not fit is listed before any work; later only NaN or Inf (with the
            tensor's name), or a file that cannot be read or written.
        CaptureError: `block_pattern` is wrong.
    """
    paths = SlabPaths.of(path)
    opened = open_source(source, model_class)
    try:
        if paths.data.exists() and any(paths.data.samefile(file) for file in opened.files):
            raise SlabError(f"{paths.data} is the checkpoint itself and would be overwritten; choose another path")
        plan = make_plan(
            opened,
            include_prefixes=include_prefixes,
            exclude=exclude,
            pack_k=pack_k,
            block_pattern=block_pattern,
            passthrough=passthrough,
            example_inputs=example_inputs,
            architecture_id=architecture_id,
        )
        _write(plan, opened.tensors, paths, progress)
    except OSError as error:
        raise SlabError(f"cannot build slab {paths.stem}: {error}") from error
    finally:
        opened.tensors.close()
    return open_slab(paths.stem, expected_signature=plan.manifest.model_signature)


def _write(plan: BuildPlan, source: TensorSource, paths: SlabPaths, progress: bool) -> None:
    layers = [layer.canonical_name for layer in plan.manifest.layers]
    reserved = pack_slab_header(plan.tensors, plan.extras, layers)
    fingerprint = hashlib.sha256(f"{__version__}:{source.fingerprint()}:".encode() + reserved).hexdigest()
    paths.stem.parent.mkdir(parents=True, exist_ok=True)
    with Journal(paths.journal, fingerprint) as journal:
        try:
            _write_data(plan, source, paths, len(reserved), journal, progress)
        except SlabError:
            for path in (paths.partial_data, paths.journal):
                path.unlink(missing_ok=True)
            raise
        _commit(plan, paths)
        journal.remove()


def _write_data(
    plan: BuildPlan,
    source: TensorSource,
    paths: SlabPaths,
    header_length: int,
    journal: Journal,
    progress: bool,
) -> None:
    tensors = {entry.name: entry for entry in plan.tensors}
    checksums: dict[str, str] = {}
    fidelity: dict[str, tuple[float, float]] = {}
    with (
        DataFile(paths.partial_data, tensors, 8 + header_length) as file,
        byte_bar(sum(plan.source_nbytes), f"building {paths.stem.name}", progress) as advance,
        one_thread_workers() as pool,
    ):

        def finish(item: QuantizeItem | CopyItem) -> tuple[Done, bool]:
            earlier = journal.done.get(_label(item))
            if earlier is not None and file.holds(earlier.checksums):
                return earlier, False
            return _work(item, source, file), True

        for item, nbytes, (done, new) in zip(plan.items, plan.source_nbytes, pool.map(finish, plan.items)):
            if new:
                journal.append(_label(item), done)
            checksums.update(done.checksums)
            if done.fidelity is not None:
                fidelity[item.name] = done.fidelity
            advance(nbytes)
        extras = replace(plan.extras, checksums=checksums, fidelity=fidelity)
        file.write_header(pack_slab_header(plan.tensors, extras, length=header_length))


def _label(item: QuantizeItem | CopyItem) -> str:
    return f"{type(item).__name__} {item.name}"


def _work(item: QuantizeItem | CopyItem, source: TensorSource, file: DataFile) -> Done:
    return quantize_item(item, source, file) if isinstance(item, QuantizeItem) else copy_item(item, source, file)


def _commit(plan: BuildPlan, paths: SlabPaths) -> None:
    """Put both files in place. Between the two renames the new data meets the old manifest: a reader sees by
    the manifest's hash in the data file that they do not belong together, unless they are equal, and then it
    is a whole slab."""
    with open(paths.partial_manifest, "w", encoding="utf-8") as file:
        file.write(plan.manifest_text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(paths.partial_data, paths.data)
    os.replace(paths.partial_manifest, paths.manifest)
    sync(paths.data.parent)
