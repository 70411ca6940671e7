"""One item of a build: read it in pieces, write it in pieces, with checksum and fidelity on the way."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
import xxhash

from squareq_fx.errors import SlabError
from squareq_fx.kernels.reference import quantize_weight
from squareq_fx.slab.checksums import checksum, raw_bytes
from squareq_fx.slab.journal import Done
from squareq_fx.slab.plan import CopyItem, QuantizeItem
from squareq_fx.slab.safetensors_header import TensorEntry
from squareq_fx.slab.sources import TensorSource

__all__ = ["DataFile", "copy_item", "quantize_item"]

_PIECE = 192 * 1024  # elements of a piece that is quantised: its temporaries stay in a core's cache
_COPY_PIECE = 1 << 20  # bytes of a piece that is copied
_SQUARES_FIT = (1e-20, 1e30)  # sums of squares in this range are good in float32


class DataFile:
    """The data file under its temporary name, addressed by tensor and byte offset within it."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorEntry], data_start: int) -> None:
        self._tensors, self._data_start = tensors, data_start
        size = data_start + sum(entry.nbytes for entry in tensors.values())
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._fd, size)

    def write(self, key: str, offset: int, data: memoryview) -> None:
        """Write bytes of tensor `key`, starting `offset` bytes into it."""
        self._write_at(self._data_start + self._tensors[key].offset + offset, data)

    def write_header(self, header: bytes) -> None:
        """Write the header, and everything to the disk."""
        self._write_at(0, memoryview(len(header).to_bytes(8, "little") + header))
        os.fsync(self._fd)

    def holds(self, checksums: Mapping[str, str]) -> bool:
        """Whether these tensors lie in the file already, by their checksums."""
        return all(key in self._tensors and self._checksum(key) == value for key, value in checksums.items())

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)

    def _write_at(self, position: int, data: memoryview) -> None:
        while data:
            count = os.pwrite(self._fd, data, position)
            data, position = data[count:], position + count

    def _checksum(self, key: str) -> str:
        entry, digest = self._tensors[key], xxhash.xxh3_64()
        position = self._data_start + entry.offset
        end = position + entry.nbytes
        while position < end:
            piece = os.pread(self._fd, min(_COPY_PIECE, end - position), position)
            digest.update(piece)
            position += len(piece)
            if not piece:
                break
        return digest.hexdigest()


def quantize_item(item: QuantizeItem, source: TensorSource, file: DataFile) -> Done:
    """Quantise one Linear by pieces of rows; rows are independent, so the pieces give what the whole would.

    Raises:
        SlabError: NaN or Inf in weight or bias, naming the tensor.
    """
    layer = item.layer
    (out, width), packed = layer.orig_shape, layer.packed_shape[1]
    rows = max(1, _PIECE // max(packed, 1))
    scale = torch.empty(out, dtype=torch.float32)
    digest, sums = xxhash.xxh3_64(), [0.0, 0.0, 0.0]
    for start in range(0, out, rows):
        stop = min(start + rows, out)
        w = source.read(item.weight, start * width, stop * width).to(torch.float32).view(stop - start, width)
        try:
            q, scale[start:stop], _ = quantize_weight(w, layer.pad_k)
        except ValueError as error:
            raise SlabError(f"{item.weight}: {error}") from error
        data = raw_bytes(q)
        digest.update(data)
        file.write(layer.qweight_key, start * packed, data)
        lost = torch.addcmul(w, q[:, :width].to(torch.float32), scale[start:stop].unsqueeze(1), value=-1)
        sums = [a + b for a, b in zip(sums, _products(w.reshape(-1), lost.reshape(-1)))]
    checksums = {
        layer.qweight_key: digest.hexdigest(),
        layer.scale_key: _write_vector(file, layer.scale_key, scale),
        layer.zero_point_key: _write_vector(file, layer.zero_point_key, torch.zeros_like(scale)),
    }
    if item.bias is not None and layer.bias_key is not None:
        bias = source.read(item.bias, 0, out).to(torch.float32)
        _check_finite(bias, item.bias, infinite_too=True)
        checksums[layer.bias_key] = _write_vector(file, layer.bias_key, bias)
    return Done(checksums, _fidelity(*sums))


def copy_item(item: CopyItem, source: TensorSource, file: DataFile) -> Done:
    """Copy one tensor bit for bit.

    Raises:
        SlabError: NaN, or Inf in a parameter, naming the tensor.
    """
    spec = source.specs[item.source]
    total, step = math.prod(spec.shape), max(1, _COPY_PIECE // spec.dtype.itemsize)
    digest = xxhash.xxh3_64()
    for start in range(0, total, step):
        piece = source.read(item.source, start, min(start + step, total))
        _check_finite(piece, item.source, infinite_too=item.is_parameter)
        data = raw_bytes(piece)
        digest.update(data)
        file.write(item.key, start * spec.dtype.itemsize, data)
    return Done({item.key: digest.hexdigest()})


def _write_vector(file: DataFile, key: str, vector: torch.Tensor) -> str:
    file.write(key, 0, raw_bytes(vector))
    return checksum(vector)


def _check_finite(values: torch.Tensor, name: str, infinite_too: bool) -> None:
    if not values.numel() or not (values.is_floating_point() or values.is_complex()):
        return
    if values.is_complex():
        values = torch.view_as_real(values)
    elif values.itemsize == 1:
        values = values.to(torch.float32)
    low, high = (float(v) for v in torch.aminmax(values))
    if math.isnan(low) or math.isnan(high) or (infinite_too and math.isinf(high - low)):
        raise SlabError(f"{name}: holds NaN or Inf; the model would compute nonsense, so repair it first")


def _products(w: torch.Tensor, error: torch.Tensor) -> tuple[float, float, float]:
    squares = float(torch.dot(w, w))
    if not _SQUARES_FIT[0] < squares < _SQUARES_FIT[1]:
        w, error = w.double(), error.double()
        squares = float(torch.dot(w, w))
    return squares, float(torch.dot(w, error)), float(torch.dot(error, error))


def _fidelity(ww: float, we: float, ee: float) -> tuple[float, float]:
    """Cosine and relative L2 error of w - e against w, from the products; nine digits, so that the text is
    the value.
    """
    if ww == 0.0:
        return 1.0, 0.0
    quantised = ww - 2 * we + ee
    cosine = (ww - we) / math.sqrt(ww * quantised) if quantised > 0.0 else 0.0
    return float(f"{max(-1.0, min(1.0, cosine)):.9g}"), float(f"{math.sqrt(ee / ww):.9g}")
