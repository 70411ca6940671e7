"""program_cache: a second compile of the same model reads its graph, and computes the same bits; anything else that counts
makes another graph.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXAMPLES, SIZES, make_slab, seeded
from torch import fx, nn

import squareq_fx
from squareq_fx import api
from squareq_fx.ir import Stage, program
from squareq_fx.lora import Lora
from squareq_fx.passes import default_passes
from squareq_fx.slab import Slab
from squareq_fx.stored.cache import ProgramCache, program_key
from squareq_fx.stored.identity import NoIdentityError, identity
from squareq_fx.verify import check

SPEC = EXAMPLES[3]


@functools.cache
def model_and_slab() -> tuple[nn.Module, Slab]:
    model = SPEC.build()
    return model, make_slab(model, SPEC.inputs())


def compiled(folder: Path | bool, model: nn.Module | None = None, **options: Any) -> squareq_fx.CompiledModule:
    own, slab = model_and_slab()
    return squareq_fx.compile(model or own, slab, example_inputs=SPEC.inputs(), progress=False, cache=folder, **options)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry a capture."""
    done: list[str] = []
    capture = api.capture

    def counted(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
        done.append(type(model).__name__)
        return capture(model, *args, **kwargs)

    monkeypatch.setattr(api, "capture", counted)
    return done


def outputs(module: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [module(**SPEC.inputs(*sizes)) for sizes in SIZES]


# ---------------------------------------------------------------------------------------------------------- the same bits


def test_a_second_compile_reads_the_graph_and_computes_the_same_bits(tmp_path: Path, captures: list[str]) -> None:
    plain, first = compiled(False), compiled(tmp_path)
    assert len(captures) == 2
    second = compiled(tmp_path)
    assert len(captures) == 2, "the second compile of the same model captured it"
    assert laws.same(outputs(second), outputs(plain)) and laws.same(outputs(first), outputs(plain))
    assert second.code == plain.code and squareq_fx.show(second) == squareq_fx.show(plain)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".graph", ".stages"]


def test_the_history_is_that_of_the_first_compile(tmp_path: Path) -> None:
    seen: list[list[Stage]] = [[], []]
    first = compiled(tmp_path, observe=seen[0].append)
    second = compiled(tmp_path, observe=seen[1].append)
    assert [s.name for s in seen[0]] == [s.name for s in seen[1]] == [s.name for s in second.history]
    for stage, original in zip(second.history, first.history):
        assert (stage.name, stage.seconds, stage.summary) == (original.name, original.seconds, original.summary)
        assert laws.text(stage.graph) == laws.text(original.graph)
        check(stage.graph)
    (path,) = tmp_path.glob("*.stages")
    third = compiled(tmp_path)
    path.unlink()
    assert third.history[-1].graph is not None
    with pytest.raises(squareq_fx.SquareQError, match="cache=False to see every stage"):
        _ = third.history[0].graph


@pytest.mark.parametrize("save", ["recompute", "save"])
def test_gradients_are_the_same_bits(tmp_path: Path, captures: list[str], save: Any) -> None:
    found = []
    for folder in (False, tmp_path, tmp_path):
        with seeded(7):  # what A starts from
            module = compiled(folder, lora=Lora(rank=3, targets="all"), save=save, inputs=("x",))
        with torch.no_grad(), seeded(8):
            for p in module.adapter_parameters().values():
                p.copy_(torch.randn(p.shape) * 0.1)
        gradients = []
        for sizes in SIZES:
            call = SPEC.inputs(*sizes)
            call["x"].requires_grad_()
            module(**call).square().sum().backward()
            gradients += [call["x"].grad, *(p.grad.clone() for p in module.adapter_parameters().values())]
        found.append(gradients)
    assert len(captures) == 2
    assert laws.same(found[1], found[0]) and laws.same(found[2], found[0])


def test_a_model_on_meta_has_the_graph_of_the_one_that_is_there(tmp_path: Path, captures: list[str]) -> None:
    model, _ = model_and_slab()
    expected = outputs(compiled(tmp_path))
    with torch.device("meta"):
        empty = SPEC.build()
    for key, value in vars(model.blocks[0].body).get("_modules", {}).items():  # plain tensors are not in the slab
        for name, attribute in vars(value).items():
            if isinstance(attribute, torch.Tensor):
                setattr(empty.blocks[0].body.get_submodule(key), name, attribute)
    found = compiled(tmp_path, empty)
    assert len(captures) == 1
    assert laws.same(outputs(found), expected)


def test_stopping_early_is_another_graph(tmp_path: Path, captures: list[str]) -> None:
    for _ in range(2):
        assert [s.name for s in compiled(tmp_path, until="quantize").history] == ["capture", "canonicalize", "quantize"]
    assert len(captures) == 1
    compiled(tmp_path)
    assert len(captures) == 2


def test_what_was_decided_by_measuring_is_kept_too(tmp_path: Path, captures: list[str]) -> None:
    model = SPEC.build()
    slab = make_slab(model, SPEC.inputs())
    found = [squareq_fx.compile(model, slab, compute="auto", progress=False, cache=tmp_path) for _ in range(2)]
    assert len(captures) == 1
    assert laws.same(outputs(found[1]), outputs(found[0]))
    assert program(found[1]).decisions == program(found[0]).decisions is not None
    assert squareq_fx.show(found[1]) == squareq_fx.show(found[0])


# ----------------------------------------------------------------------------------------------------------- the key


def key_of(model: nn.Module | None = None, slab: Slab | None = None, **options: Any) -> str:
    own, of_own = model_and_slab()
    slab = slab or of_own
    given = {k: options.pop(k) for k in ("example_inputs", "device", "block_pattern", "until") if k in options}
    given.setdefault("example_inputs", SPEC.inputs())
    return program_key(model or own, slab, default_passes(slab, **options), **given)


def test_equal_models_have_one_key() -> None:
    assert key_of(SPEC.build()) == key_of()
    other = SPEC.build()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert key_of(other.train()) == key_of(), "neither values nor the mode count"
    assert key_of(example_inputs=SPEC.inputs(seed=5)) == key_of()


@pytest.mark.parametrize(
    "options",
    [
        {"lora": Lora(rank=3, targets="all")},
        {"lora": Lora(rank=4, targets="all")},
        {"lora": Lora(rank=3, targets="all"), "save": "save"},
        {"lora": Lora(rank=3, targets="all"), "save": {"head": "save"}},
        {"inputs": ("x",)},
        {"compute": "w8a8"},
        {"compute": {"head": "w8a8"}},
        {"compute": "w8a8", "keep": ("head",)},
        {"slots": 3},
        {"slots": 3, "distance": 2},
        {"budget": 10**6},
        {"until": "outline"},
        {"block_pattern": "blocks"},
        {"device": "meta"},
        {"example_inputs": SPEC.inputs(3)},
        {"example_inputs": tuple(SPEC.inputs().values())},
        {"example_inputs": {k: v.double() for k, v in SPEC.inputs().items()}},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_counts(options: dict[str, Any]) -> None:
    assert key_of(**options) != key_of()
    assert key_of(**options) == key_of(**options)


def _hooked(model: Any) -> None:
    model.head.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "visits", 3),
        lambda m: setattr(m, "extra", 1),
        lambda m: m.to(torch.bfloat16),
        lambda m: setattr(m, "head", nn.Linear(12, 12, bias=False)),
        lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.t().contiguous().t())),
        lambda m: m.register_buffer("more", torch.zeros(3)),
        lambda m: setattr(m, "post", m.pre),
        lambda m: setattr(m.post, "weight", nn.Parameter(m.post.weight.clone())),
        lambda m: setattr(m, "forward", types.MethodType(lambda self, x, context, labels=None: x, m)),
        _hooked,
    ],
)
def test_every_change_of_the_model_counts(change: Callable[[Any], Any]) -> None:
    model = SPEC.build()
    change(model)
    assert key_of(model) != key_of()


def test_another_slab_counts() -> None:
    other = SPEC.build()
    with torch.no_grad():
        other.head.weight.mul_(1.5)
    assert key_of(slab=make_slab(other, SPEC.inputs())) != key_of()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.setattr(torch, "__version__", "9.9"),
        lambda m: m.setattr("squareq_fx.stored.surroundings.package_identity", lambda: "other"),
        lambda m: m.setattr("platform.python_version", lambda: "4.0"),
        lambda m: m.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False),
    ],
)
def test_versions_count(monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]) -> None:
    before = key_of()
    change(monkeypatch)
    assert key_of() != before


def test_the_default_type_counts() -> None:
    before = key_of()
    torch.set_default_dtype(torch.float64)
    try:
        assert key_of() != before
    finally:
        torch.set_default_dtype(torch.float32)


_HELPER = "FACTOR = {factor}\n\ndef scaled(x):\n    return x * FACTOR\n"
_MODEL = """
    import torch
    from torch import nn
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
        def forward(self, x):
            from cache_helper import scaled
            return scaled(self.lin(x)){more}
"""
_PRINT_KEY = """
    import sys, torch
    sys.path.insert(0, sys.argv[1])
    from cache_model import Scaled
    from squareq_fx.stored.identity import identity
    print(identity([Scaled()]))
"""


def test_source_counts_also_that_of_what_it_imports(tmp_path: Path) -> None:
    def key(factor: int, more: str = "") -> str:
        (tmp_path / "cache_helper.py").write_text(_HELPER.format(factor=factor))
        (tmp_path / "cache_model.py").write_text(textwrap.dedent(_MODEL.format(more=more)))
        return _python(_PRINT_KEY, str(tmp_path), PYTHONDONTWRITEBYTECODE="1")

    first = key(2)
    assert key(2) == first, "the same in two processes"
    assert key(3) != first, "a module that only forward imports"
    assert key(2, " + 1") != first


def _python(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------------------ identity


@dataclass
class Holder:
    value: Any
    more: list[Any] = field(default_factory=list)


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    | st.builds(Holder, inner),
    max_leaves=6,
)


@given(_PLAIN, _PLAIN)
@settings(max_examples=200)
def test_values_have_one_identity_if_they_are_equal(one: Any, other: Any) -> None:
    assert identity([one]) == identity([one])
    assert (identity([one]) == identity([other])) == (repr(one) == repr(other))


def test_what_is_shared_is_told_from_what_is_equal() -> None:
    a, b = torch.zeros(2), torch.zeros(2)
    assert identity([[a, a]]) != identity([[a, b]])
    assert identity([Holder(a)]) == identity([Holder(b)])
    itself: Any = Holder(1)
    itself.more.append(itself)
    assert identity([itself]) == identity([itself])


def test_functions_and_closures() -> None:
    def made(n: int) -> Callable[[int], int]:
        return lambda x: x + n

    assert identity([made(1)]) == identity([made(1)]) != identity([made(2)])
    assert identity([functools.partial(max, 1)]) != identity([functools.partial(max, 2)])
    assert identity([torch.nn.functional.silu]) != identity([torch.nn.functional.gelu])
    assert identity([Holder(1).__repr__]) != identity([Holder(2).__repr__])
    assert identity([{1, 2}]) == identity([{2, 1}])


@pytest.mark.parametrize(
    "value", [threading.Lock(), torch.Generator(), (i for i in range(2)), memoryview(b"")], ids=lambda v: type(v).__name__
)
def test_what_cannot_be_looked_into_has_no_identity(value: Any) -> None:
    with pytest.raises(NoIdentityError):
        identity([Holder(value)])
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(NoIdentityError):
        identity([nested])


# ------------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b"squareq_fx graph 1", b"squareq_fx graph 0"),
    ],
)
def test_a_damaged_entry_is_replaced(tmp_path: Path, captures: list[str], damage: Callable[[bytes], bytes]) -> None:
    expected = outputs(compiled(tmp_path))
    (path,) = tmp_path.glob("*.graph")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match="cannot be used and is made again"):
        found = compiled(tmp_path)
    assert len(captures) == 2 and laws.same(outputs(found), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(tmp_path)
    assert len(captures) == 2


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="cannot be used|not kept"):
        compiled(tmp_path / "file")


def test_a_model_that_cannot_be_looked_into_is_compiled_anew(tmp_path: Path, captures: list[str]) -> None:
    model = SPEC.build()
    model.generator = torch.Generator()
    for _ in range(2):
        with pytest.warns(UserWarning, match="not kept, because what it depends on holds a torch._C.Generator"):
            found = compiled(tmp_path, model)
    assert len(captures) == 2 and not list(tmp_path.iterdir())
    assert laws.same(outputs(found), outputs(compiled(False)))


def test_own_passes_are_not_kept(tmp_path: Path, captures: list[str]) -> None:
    _, slab = model_and_slab()
    for _ in range(2):
        compiled(tmp_path, passes=default_passes(slab))
    assert len(captures) == 2 and not list(tmp_path.iterdir())


def test_the_least_used_go_first(tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path, limit=10**9)
    model, slab = model_and_slab()
    graph = squareq_fx.run(squareq_fx.capture(model, SPEC.inputs(), slab=slab), default_passes(slab))

    def get(cache: ProgramCache, key: str) -> bool:
        return cache.get(lambda: key, model, lambda: graph)[1]

    assert [get(cache, key) for key in "abc"] == [False] * 3
    for at, key in enumerate("abc"):
        for path in tmp_path.glob(f"{key}.*"):
            os.utime(path, (at + 1, at + 1))
    assert get(cache, "a"), "which makes it the newest"
    size = sum(p.stat().st_size for p in tmp_path.glob("a.*"))
    small = ProgramCache(tmp_path, limit=2 * size + size // 2)
    assert not get(small, "d")
    assert {p.stem for p in tmp_path.iterdir()} == {"a", "d"}
    assert not get(ProgramCache(tmp_path, limit=0), "e")
    assert {p.stem for p in tmp_path.iterdir()} == {"e"}, "the one just made stays"


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ProgramCache.of(True) is None, "tests set SQUAREQ_CACHE=0"
    monkeypatch.delenv("SQUAREQ_CACHE")
    monkeypatch.setenv("SQUAREQ_CACHE_DIR", str(tmp_path))
    found = ProgramCache.of(True)
    assert found is not None and found.folder == tmp_path / "programs"
    monkeypatch.delenv("SQUAREQ_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = ProgramCache.of(True)
    assert found is not None and found.folder == tmp_path / ".cache" / "squareq_fx" / "programs"
    assert ProgramCache.of(False) is None
    at = ProgramCache.of(tmp_path / "here")
    assert at is not None and at.folder == tmp_path / "here"


# ----------------------------------------------------------------------------------------------------------- processes

_COMPILE = """
    import json, sys, warnings
    sys.path.insert(0, sys.argv[1])
    warnings.simplefilter("error", UserWarning)
    import torch, squareq_fx
    from squareq_fx import api
    from models import EXAMPLES
    spec, done, capture = EXAMPLES[3], [], api.capture
    api.capture = lambda *a, **k: done.append(1) or capture(*a, **k)
    gm = squareq_fx.compile(spec.build(), sys.argv[2], example_inputs=spec.inputs(), progress=False, cache=sys.argv[3])
    with torch.no_grad():
        print(json.dumps([len(done), gm(**spec.inputs()).flatten().tolist(), gm.code]))
"""


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Two at once make the same entry, a third reads it; all compute the same."""
    _, slab = model_and_slab()
    arguments = (str(Path(__file__).parent), str(slab.path), str(tmp_path))
    found: list[str] = []
    both = [threading.Thread(target=lambda: found.append(_python(_COMPILE, *arguments))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    found.append(_python(_COMPILE, *arguments))
    (_, first, code), (_, second, _), (captured, third, again) = map(json.loads, found)
    assert first == second == third and code == again
    assert captured == 0
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_reading_is_several_times_faster(tmp_path: Path) -> None:
    """Of a small SDXL: the second compile, against the first without what it spends on keeping the graph."""
    from time import perf_counter

    from backbones import backbone
    from compiled import family_slab

    model, slab = backbone("sdxl"), family_slab("sdxl")
    seconds = []
    for _ in range(2):
        start = perf_counter()
        module = squareq_fx.compile(model, slab, progress=False, cache=tmp_path)
        seconds.append(perf_counter() - start)
    made = sum(stage.seconds for stage in module.history)
    print(f"capture and passes {made:.1f} s, first compile {seconds[0]:.1f} s, second {seconds[1]:.1f} s")
    assert seconds[1] < made / 3
    assert program(module).history[0].name == "capture"
