"""The pipeline believes nothing a pass returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import EXAMPLES, few, specs, staged
from torch import fx

import squareq_fx
from squareq_fx import edit, ir
from squareq_fx.errors import PassError, SquareQError, VerificationError
from squareq_fx.passes import Canonicalize, Outline, Quantize, Schedule, Stream, default_passes, insert_after
from squareq_fx.pipeline import pass_name, run
from squareq_fx.verify import fingerprint

aten = torch.ops.aten
NAMES = ["canonicalize", "quantize", "outline", "stream", "activations", "fuse", "attention", "schedule"]


def captured() -> fx.GraphModule:
    return staged(EXAMPLES[0]).graphs["capture"]


@few
@given(specs(), st.integers(0, len(NAMES)))
def test_the_same_stages_whether_run_at_once_or_in_two_parts(spec: Any, cut: int) -> None:
    models = staged(spec)
    passes = default_passes(models.slab)
    whole = run(models.graphs["capture"], passes)
    halves = run(run(models.graphs["capture"], passes[:cut]), passes[cut:])
    assert [s.name for s in ir.program(whole).history] == ["capture", *NAMES]
    assert [s.name for s in ir.program(halves).history] == ["capture", *NAMES]
    assert squareq_fx.show(whole) == squareq_fx.show(halves)


@pytest.mark.parametrize("until", ["capture", *NAMES])
def test_until_stops_after_the_pass_and_keeps_the_history(until: str) -> None:
    models = staged(EXAMPLES[0])
    seen: list[str] = []
    gm = run(models.graphs["capture"], default_passes(models.slab), until=until, observe=lambda s: seen.append(s.name))
    wanted = ["capture", *NAMES][: ["capture", *NAMES].index(until) + 1]
    assert [stage.name for stage in ir.program(gm).history] == wanted
    assert seen[-len(wanted) :] == wanted or seen == wanted[1:]
    assert all(stage.seconds >= 0 and stage.summary for stage in ir.program(gm).history)


def test_until_and_insert_after_refuse_names_that_do_not_exist() -> None:
    with pytest.raises(PassError, match="quantise.*capture, canonicalize, quantize"):
        run(captured(), default_passes(staged(EXAMPLES[0]).slab), until="quantise")
    with pytest.raises(PassError, match="no pass 'quantise' to insert after"):
        insert_after(default_passes(staged(EXAMPLES[0]).slab), "quantise", Canonicalize())


def test_insert_after_and_names() -> None:
    passes = insert_after(default_passes(staged(EXAMPLES[0]).slab), "outline", triple)
    assert [pass_name(p) for p in passes] == [*NAMES[:3], "triple", *NAMES[3:]]


def test_the_summary_counts_operations() -> None:
    models = staged(EXAMPLES[0])
    stages = {s.name: s for s in ir.program(run(models.graphs["capture"], default_passes(models.slab))).history}
    layers = sum(n.target is torch.ops.squareq.int8_linear.default for n in stages["quantize"].graph.graph.nodes)
    assert f"-{layers} aten.linear.default" in stages["quantize"].summary
    assert f"+{layers} squareq.int8_linear.default" in stages["quantize"].summary
    assert "+int8_linear" not in squareq_fx.diff(stages["capture"].graph, stages["canonicalize"].graph)
    assert "int8_linear" in squareq_fx.diff(stages["canonicalize"].graph, stages["quantize"].graph)


# ------------------------------------------------------------------------------------------- passes that lie


def triple(gm: fx.GraphModule) -> fx.GraphModule:
    """A correct pass: changes nothing."""
    return ir.clone(gm)


def same_object(gm: fx.GraphModule) -> fx.GraphModule:
    return gm


def returns_nothing(gm: fx.GraphModule) -> Any:
    return None


def returns_graph(gm: fx.GraphModule) -> Any:
    return ir.clone(gm).graph


def edits_its_input(gm: fx.GraphModule) -> fx.GraphModule:
    result = ir.clone(gm)
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    node.meta["squareq"] = ir.Info(made_by="a vandal")
    return result


def edits_a_constant(gm: fx.GraphModule) -> fx.GraphModule:
    result = ir.clone(gm)
    next(n for n in gm.graph.nodes if n.op == "call_function").args = ()
    return result


def loses_the_record(gm: fx.GraphModule) -> fx.GraphModule:
    result = ir.clone(gm)
    del result.meta["squareq"]
    return result


def loses_a_weight(gm: fx.GraphModule) -> fx.GraphModule:
    result = ir.clone(gm)
    weight = next(n for n in result.graph.nodes if ir.info(n).kind == "weight")
    with result.graph.inserting_before(weight):
        new = edit.add_weight(weight, "another.weight", weight.meta["val"], made_by="loses_a_weight")
    edit.replace(weight, new)
    return edit.finish(result)


def adds_an_input(gm: fx.GraphModule) -> fx.GraphModule:
    result = ir.clone(gm)
    first = next(iter(result.graph.nodes))
    with result.graph.inserting_before(first):
        new = result.graph.placeholder("extra")
    new.meta["val"] = first.meta["val"]
    ir.set_info(new, kind="input", key="extra")
    return edit.finish(result)


def changes_a_type(gm: fx.GraphModule) -> fx.GraphModule:
    result = ir.clone(gm)
    node = result.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    node.args = (node.args[1], *node.args[1:])
    return edit.finish(result)


def breaks_its_promise(gm: fx.GraphModule) -> fx.GraphModule:
    return ir.clone(gm)


def _promise(before: fx.GraphModule, after: fx.GraphModule) -> None:
    raise PassError("nothing was improved")


breaks_its_promise.ensures = _promise  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("lie", "kind", "words"),
    [
        (same_object, PassError, "returned its own input"),
        (returns_nothing, PassError, "returned NoneType"),
        (returns_graph, PassError, "returned Graph"),
        (edits_its_input, PassError, "changed its input"),
        (edits_a_constant, PassError, "changed its input"),
        (loses_the_record, PassError, "lost the program record"),
        (loses_a_weight, VerificationError, "changes_inputs = True"),
        (adds_an_input, VerificationError, "the call's inputs were"),
        (changes_a_type, VerificationError, "model source"),
        (breaks_its_promise, PassError, "nothing was improved"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_pass_that_lies_is_named(lie: Callable[[Any], Any], kind: type[SquareQError], words: str) -> None:
    gm = ir.clone(captured())
    with pytest.raises(kind) as caught:
        run(gm, (lie,))
    assert lie.__name__ in str(caught.value) and words in str(caught.value)


def test_a_changed_type_names_the_node_and_the_line_of_the_model() -> None:
    with pytest.raises(VerificationError, match=r"(?s)pass changes_a_type: node \w*linear\w* .*models\.py.*line \d+"):
        run(ir.clone(captured()), (changes_a_type,))


@pytest.mark.parametrize(
    ("early", "level"), [(Stream(), "outlined"), (Schedule(), "streamed")], ids=["stream", "schedule"]
)
def test_a_pass_that_comes_too_early(early: Any, level: str) -> None:
    with pytest.raises(PassError, match=f"pass {early.name} needs a graph that is {level}"):
        run(captured(), (Canonicalize(), early))


def test_quantize_comes_before_outline() -> None:
    models = staged(EXAMPLES[0])
    with pytest.raises(PassError, match=r"pass quantize: .*before outline"):
        run(models.graphs["capture"], (Canonicalize(), Outline(), Quantize(models.slab)))


def test_new_nodes_carry_the_pass_and_the_source_of_what_they_read() -> None:
    def shift(gm: fx.GraphModule) -> fx.GraphModule:
        result = ir.clone(gm)
        node = result.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
        with result.graph.inserting_after(node):
            new = result.graph.call_function(aten.add.Tensor, (node, 0.0))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        new.meta["val"] = node.meta["val"]
        return edit.finish(result)

    before = fingerprint(captured())
    gm = run(captured(), (shift,))
    made = [n for n in gm.graph.nodes if ir.info(n).made_by == "shift"]
    assert len(made) == 1 and "models.py" in ir.model_source(made[0])
    assert fingerprint(captured()) == before
