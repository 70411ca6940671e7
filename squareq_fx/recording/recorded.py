"""A lowered graph run through recorded pieces: one launch for all the kernels between two nodes that move memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from squareq_fx.errors import RuntimeStateError
from squareq_fx.recording.cuda_graphs import CudaRecorder, Recorder, check_device, copy_into, memory_like
from squareq_fx.recording.pieces import plan
from squareq_fx.recording.replay import Recording

__all__ = ["Recorded", "RecordingReport", "check_device", "recorded"]

_MAX_MOVES = 3
_MAX_WARM = 256


@dataclass(frozen=True)
class RecordingReport:
    """What is recorded of a graph.

    Attributes:
        pieces: recorded runs of kernels in one call of the graph.
        recordings: sizes that are recorded now.
        recorded: recordings made so far.
        dropped: recordings given up, for others or because weights had moved.
        eager: calls that ran as they are: the first of each kind, and those with inputs on another device.
        nbytes: device memory of the pool, which all recordings (and graphs that share the recorder) use in turn; None if not
            known.
    """

    pieces: int
    recordings: int
    recorded: int
    dropped: int
    eager: int
    nbytes: int | None


def recorded(gm: fx.GraphModule, *, limit: int = 4, recorder: Recorder | None = None) -> Recorded:
    """A callable with the inputs and outputs of `gm`, which from the third call with the same sizes on starts recorded kernels.

    The first call of each kind runs `gm` as it is, the second records it. A kind is the sizes, strides and types of all tensor
    inputs, the values of all other inputs, and torch's settings that choose kernels.

    Args:
        gm: what `lowered` returned, on a CUDA device: a flat graph whose inputs are the call's tensors and sizes. It must not
            draw random numbers or wait for the device within a run of nodes that move no memory.
        limit: recordings to keep; the one unused for longest goes first.
        recorder: where to record; to be shared by graphs that never run at the same time, such as the two halves of a training
            step, which then share their memory too. Default: a `CudaRecorder` of the inputs' device.

    Raises:
        ValueError: `limit` is below 1.
    """
    return Recorded(gm, limit, recorder)


class Recorded:
    """See `recorded`. Neither inputs nor outputs lie in recorded memory: both may be kept, overwritten or passed on freely."""

    def __init__(self, gm: fx.GraphModule, limit: int, recorder: Recorder | None) -> None:
        if limit < 1:
            raise ValueError(f"limit is {limit}; at least one recording must be kept")
        self._gm, self._plan, self._limit = gm, plan(gm), limit
        self._recorder = recorder
        self._warm: OrderedDict[Any, int] = OrderedDict()
        self._recordings: OrderedDict[Any, Recording] = OrderedDict()
        self._made = self._dropped = self._eager = 0
        pieces = [step for step in self._plan.steps if step.kind == "piece"]
        read = {node for step in pieces for node in step.reads}
        self._read = [position for position, node in enumerate(self._plan.inputs) if node in read]

    def __call__(self, *inputs: Any) -> Any:
        """What `gm(*inputs)` returns, without gradients.

        Raises:
            RuntimeStateError: a piece cannot be recorded, naming it; weights lie elsewhere at every call; two calls at once.
            SquareQError: the inputs are not on a CUDA device.
        """
        key = _key(inputs)
        with torch.inference_mode(False), torch.no_grad():
            if key not in self._warm:  # kernels are compiled and chosen, handles made: none of it can be recorded
                self._eager += 1
                result = self._gm(*map(_aligned, inputs))
                self._warm[key] = 0
                if len(self._warm) > _MAX_WARM:
                    self._drop(self._warm.popitem(last=False)[0])
                return result
            self._warm.move_to_end(key)
            recorder = self._recorder = self._recorder or CudaRecorder(_device(inputs))
            with recorder.turn():
                if key in self._recordings:
                    return self._replay(key, inputs)
                if all(inputs[i].device == recorder.device for i in self._read if isinstance(inputs[i], torch.Tensor)):
                    return self._record(recorder, key, inputs)
            # Attention keeps its seed on the host unless it is recorded: a backward after a forward that was not.
            self._eager += 1
            return self._gm(*inputs)

    def report(self) -> RecordingReport:
        nbytes = self._recorder.nbytes() if self._recorder is not None else 0
        return RecordingReport(self._plan.pieces, len(self._recordings), self._made, self._dropped, self._eager, nbytes)

    def close(self) -> None:
        """Frees all recordings. A later call records again."""
        for key in list(self._recordings):
            self._drop(key)

    def _record(self, recorder: Recorder, key: Any, inputs: Sequence[Any]) -> Any:
        while len(self._recordings) >= self._limit:
            self._drop(next(iter(self._recordings)))
        recording = Recording(self._gm, self._plan, recorder)
        try:
            result = recording.record(inputs)
        except BaseException:
            recording.release()
            raise
        self._recordings[key] = recording
        self._made += 1
        return result

    def _replay(self, key: Any, inputs: Sequence[Any]) -> Any:
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        result = recording.replay(inputs)
        if recording.moved is None:
            self._warm[key] = 0
            return result
        self._drop(key)
        self._warm[key] += 1
        if self._warm[key] >= _MAX_MOVES:
            raise RuntimeStateError(
                f"{recording.moved} lies at another address at every call, so what was recorded cannot read it. Compile with "
                'the default passes, whose schedule gives each load its place, or with backend="inductor".'
            )
        return result

    def _drop(self, key: Any) -> None:
        recording = self._recordings.pop(key, None)
        if recording is not None:
            recording.release()
            self._dropped += 1


def _key(inputs: Sequence[Any]) -> Any:
    kinds = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else (type(x), x) for x in inputs]
    settings = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.fp32_precision,
    )
    return settings, tuple(kinds)


def _aligned(x: Any) -> Any:
    """As the buffers of a recording are: some kernels are compiled apart for what is not aligned."""
    if not isinstance(x, torch.Tensor) or x.data_ptr() % 16 == 0:
        return x
    copy = memory_like(x)
    copy_into([copy], [x])
    return copy


def _device(inputs: Sequence[Any]) -> torch.device:
    devices = [x.device for x in inputs if isinstance(x, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
