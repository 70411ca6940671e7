"""The slab: SquareQ V2 files with blocks in execution order, everything else of the model, and checksums."""

from squareq_fx.slab.build import build_slab
from squareq_fx.slab.inputs import describe_inputs, restore_inputs, split_inputs
from squareq_fx.slab.layout import segment_layout
from squareq_fx.slab.manifest import LayerEntry, Manifest, model_signature
from squareq_fx.slab.opening import open_slab
from squareq_fx.slab.reader import SegmentEntry, Slab
from squareq_fx.slab.safetensors_header import TensorEntry

__all__ = [
    "LayerEntry",
    "Manifest",
    "SegmentEntry",
    "Slab",
    "TensorEntry",
    "build_slab",
    "describe_inputs",
    "model_signature",
    "open_slab",
    "restore_inputs",
    "segment_layout",
    "split_inputs",
]
