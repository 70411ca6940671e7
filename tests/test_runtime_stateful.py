"""Any sequence of calls, right or wrong, against a model that knows only the rules."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from runtime_support import BACKINGS, make_store, read

from squareq_fx.errors import RuntimeStateError
from squareq_fx.runtime import Runtime

pytestmark = pytest.mark.timeout(120)

SIZES = (256, 300, 512, 700, 0)
ARENA = 1280
KEPT = "b2"

blocks = st.sampled_from([f"b{i}" for i in range(len(SIZES))])
visits = st.integers(0, 1)
offsets = st.sampled_from([None, 0, 256, 512, 768, 1024, 1280, 128])


@dataclass
class Claim:
    offset: int | None
    nbytes: int
    step: int
    weights: torch.Tensor | None = None


class AnySequence(RuleBasedStateMachine):
    """`claims` is what must be true of the device; each rule knows beforehand whether its call is allowed."""

    @initialize(backing=st.sampled_from(BACKINGS), poison=st.booleans())
    def start(self, backing: str, poison: bool) -> None:
        self.store, self.truth = make_store(SIZES, backing, keep_resident=[KEPT])
        self.runtime = Runtime(self.store, arena_bytes=ARENA, poison=poison, chunk_bytes=100, staging_slots=2)
        self.resident = set(self.truth) if backing == "resident" else {KEPT}
        self.claims: dict[tuple[str, int], Claim] = {}
        self.step: ExitStack | None = None
        self.steps = 0

    @rule()
    def enter_step(self) -> None:
        step = ExitStack()
        if self.step is not None:
            with pytest.raises(RuntimeStateError, match="in a step already"):
                step.enter_context(self.runtime.step())
            return
        step.enter_context(self.runtime.step())
        self.step, self.steps = step, self.steps + 1

    @rule(fails=st.booleans())
    def leave_step(self, fails: bool) -> None:
        if self.step is None:
            return
        step, self.step = self.step, None
        loaded = [key for key, claim in self.claims.items() if claim.weights is not None]
        if fails:
            with pytest.raises(KeyError), step:
                raise KeyError
            self.claims = {}
        elif loaded:
            with pytest.raises(RuntimeStateError, match="never evicted") as caught, step:
                pass
            assert all(f"{block!r} (visit {visit})" in str(caught.value) for block, visit in loaded)
            self.claims = {}
        else:
            with step:
                pass
            self.claims = {key: claim for key, claim in self.claims.items() if claim.step == self.steps}
            assert self.runtime.last_step is not None
            if self.runtime.last_step.events:
                kept = sum(claim.nbytes for claim in self.claims.values())
                assert self.runtime.last_step.events[-1].bytes_in_use == kept

    @rule(block=blocks, visit=visits, offset=offsets)
    def prefetch(self, block: str, visit: int, offset: int | None) -> None:
        nbytes = len(self.truth[block])
        if self.step is not None and block in self.resident:
            self.runtime.prefetch(block, visit, nbytes, offset)
            return
        claim = self.claims.get((block, visit))
        if self.is_allowed(block, visit, nbytes, offset, again=False):
            self.runtime.prefetch(block, visit, nbytes, offset)
            if claim is not None and claim.offset == offset:
                claim.step = self.steps
            else:
                self.claims[block, visit] = Claim(offset, nbytes, self.steps)
        else:
            with pytest.raises(RuntimeStateError):
                self.runtime.prefetch(block, visit, nbytes, offset)

    @rule(block=blocks, visit=visits, offset=offsets)
    def load(self, block: str, visit: int, offset: int | None) -> None:
        nbytes = len(self.truth[block])
        if self.is_allowed(block, visit, nbytes, offset, again=True):
            weights = self.runtime.load(block, visit, nbytes, offset)
            where = None if block in self.resident else offset
            self.claims[block, visit] = Claim(where, nbytes, self.steps, weights)
            assert weights.dtype == torch.uint8 and weights.shape == (nbytes,)
        else:
            with pytest.raises(RuntimeStateError):
                self.runtime.load(block, visit, nbytes, offset)

    @rule(block=blocks, visit=visits)
    def evict(self, block: str, visit: int) -> None:
        claim = self.claims.get((block, visit))
        if self.step is not None and claim is not None and claim.weights is not None:
            self.runtime.evict(claim.weights, block, visit)
            del self.claims[block, visit]
        else:
            with pytest.raises(RuntimeStateError):
                self.runtime.evict(torch.empty(4, dtype=torch.uint8), block, visit)

    @rule(block=blocks, nbytes=st.sampled_from([1, 299, 4096]))
    def wrong_size_or_name(self, block: str, nbytes: int) -> None:
        for call in (self.runtime.load, self.runtime.prefetch):
            with pytest.raises(RuntimeStateError):
                call(block, 0, nbytes, None)
            with pytest.raises(RuntimeStateError):
                call("b", 0, nbytes, None)

    @invariant()
    def every_loaded_block_has_its_own_bytes(self) -> None:
        for (block, _), claim in getattr(self, "claims", {}).items():
            if claim.weights is not None:
                assert read(claim.weights) == self.truth[block]

    def teardown(self) -> None:
        if hasattr(self, "runtime"):
            self.runtime.shutdown()

    def is_allowed(self, block: str, visit: int, nbytes: int, offset: int | None, *, again: bool) -> bool:
        """Applies what gives way to the call, and says if the call then succeeds."""
        if self.step is None:
            return False
        claim = self.claims.get((block, visit))
        if claim is not None and claim.weights is not None:
            return False
        if block in self.resident:
            return True
        if claim is not None and claim.offset == offset:
            return again or claim.step != self.steps
        if claim is not None and claim.step == self.steps:
            return False
        self.claims.pop((block, visit), None)
        if offset is None:
            return True
        if offset % 256 or offset + nbytes > ARENA:
            return False
        overlapping = [
            key
            for key, other in self.claims.items()
            if other.offset is not None
            and max(offset, other.offset) < min(offset + nbytes, other.offset + other.nbytes)
        ]
        if any(
            self.claims[key].weights is not None or self.claims[key].step == self.steps for key in overlapping
        ):
            return False
        for key in overlapping:
            del self.claims[key]
        return True


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(stateful_step_count=40, max_examples=80)
