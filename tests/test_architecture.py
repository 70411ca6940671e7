"""The house rules: who imports whom, which tests a pass has, how large a file may be, and what an import may cost."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import squareq_fx

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"squareq_fx": "squareq_fx", "squareq_fx.passes": "passes", "squareq_fx.kernels": "kernels"}

LAYERS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors", "kernels"),
    (
        *("ir", "specs", "ops", "attention_rules", "attention_op", "blocks", "families", "calls", "compute"),
        *("slab", "lora", "adapters", "checkpoint", "durable", "collector", "progress", "views"),
    ),
    (
        *("inference", "edit", "epilogues", "inlining", "liveness", "verify"),
        *("tracing", "capture", "gradients", "lowering", "recording"),
        *("runtime", "weights", "binding", "stored"),
    ),
    ("pipeline",),
    ("passes",),
    (
        *("training", "adapter_methods", "compiled", "functional", "emit", "memory", "auto"),
        *("cached_graphs", "api", "demo", "cli", ""),
    ),
)
"""Rooms (a module, or a package with all that is in it) from the ground up; "" is `squareq_fx/__init__.py`.

A module imports from its own layer or below, and nowhere is there a circle.
"""

RAISE_NOTHING = {"diff", "draw", "latest_checkpoint"}
MAX_LINES = 450
MAX_IMPORT_SECONDS = 0.5
HEAVY = {
    "accelerate",
    "diffusers",
    "jinja2",
    "matplotlib",
    "networkx",
    "peft",
    "rich",
    "sklearn",
    "sympy",
    "transformers",
}
HEAVY |= {"triton", "typer"}


@dataclass(frozen=True)
class Import:
    """`module` imports `target`; at once, or in a function when it is first called."""

    module: str
    target: str
    lazy: bool


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by the name it is imported by."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(module: str) -> Iterator[Import]:
    """What a module imports of ours; what only type checkers see does not count."""
    yield from _imports(module, parsed(modules()[module]).body, lazy=False)


def _imports(module: str, body: list[ast.stmt], lazy: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, lazy) for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively, line {node.lineno}"
            if _is_ours(node.module or ""):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield Import(module, inner if inner in modules() else str(node.module), lazy)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            blocks = [value for _, value in ast.iter_fields(node) if isinstance(value, list)]
            for block in blocks:
                statements = [inner for inner in block if isinstance(inner, ast.stmt)]
                handlers = [s for inner in block if isinstance(inner, ast.excepthandler) for s in inner.body]
                yield from _imports(module, statements + handlers, lazy or is_function)


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in ("squareq_fx", "passes", "kernels")


def room(module: str) -> str:
    return module.removeprefix("squareq_fx").removeprefix(".").partition(".")[0]


def layer(module: str) -> int:
    return next(i for i, rooms in enumerate(LAYERS) if room(module) in rooms)


def test_every_module_has_a_place_in_the_table() -> None:
    rooms = [name for names in LAYERS for name in names]
    assert len(rooms) == len(set(rooms))
    assert {room(module) for module in modules()} == set(rooms)


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module: str) -> None:
    upwards = [i.target for i in imports(module) if i.target not in modules() or layer(i.target) > layer(module)]
    assert upwards == [], f"{module} is in layer {layer(module)}"


def test_imports_make_no_circle() -> None:
    """Not even lazy ones: a circle that waits for a call is one all the same."""
    edges = {module: {i.target for i in imports(module)} - {module} for module in modules()}
    try:
        list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        pytest.fail(f"circular imports: {' <- '.join(error.args[1])}")


def test_kernels_know_nothing_but_errors_and_each_other() -> None:
    outside = [
        (module, i.target)
        for module in modules()
        if room(module) == "kernels"
        for i in imports(module)
        if room(i.target) not in ("kernels", "errors")
    ]
    assert outside == []


def test_passes_do_not_know_each_other() -> None:
    others = [
        (module, i.target)
        for module in modules()
        if room(module) == "passes" and module != "squareq_fx.passes"
        for i in imports(module)
        if room(i.target) == "passes"
    ]
    assert others == []


def test_operations_find_their_kernels_when_they_are_called() -> None:
    """So a graph can be captured, printed and checked without Triton."""
    kernels = [i for i in imports("squareq_fx.ops") if room(i.target) == "kernels"]
    assert kernels and all(i.lazy for i in kernels)
    with_triton = [m for m in modules() if room(m) == "kernels" and "triton" in _imported_roots(modules()[m])]
    at_once = {i.target for module in modules() if module not in with_triton for i in imports(module) if not i.lazy}
    assert with_triton and at_once.isdisjoint(with_triton)


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_pass_has_property_tests(path: Path) -> None:
    test = ROOT / "tests" / f"test_{path.stem}.py"
    assert test.exists(), f"the pass {path.stem} has no tests"
    assert _imported_roots(test) & {"hypothesis", "laws"}, f"{test.name} uses neither hypothesis nor laws"


def _imported_roots(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


SOURCES = sorted(
    path for folder in ("squareq_fx", "passes", "kernels", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_small_finished_and_explicit(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert re.findall(r"\b(TODO|FIXME|XXX|NotImplementedError|NotImplemented)\b", text) == []
    handlers = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ExceptHandler)]
    broad = [h for h in handlers if h.type is None or ast.unparse(h.type) in ("Exception", "BaseException")]
    swallowed = [h.lineno for h in broad if not any(_raises(node) for node in ast.walk(h))]
    assert swallowed == [], "catches every exception and does not raise it again"


def _raises(node: ast.AST) -> bool:
    """Or hands the exception to what raises it in another thread: `transfer.fail(error)`."""
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    return isinstance(node, ast.Raise) or (is_call and node.func.attr == "fail")  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", modules())
def test_what_a_module_offers_is_listed_and_exists(module: str) -> None:
    if "triton" in _imported_roots(modules()[module]):
        pytest.importorskip("triton")
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    public = {
        node.name
        for node in parsed(modules()[module]).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not any("app.command" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    assert public <= set(getattr(loaded, "__all__", ())), "a public function or class is not in __all__"
    assert [name for name in getattr(loaded, "__all__", ()) if not hasattr(loaded, name)] == []
    undocumented = [name for name in public if not inspect.getdoc(getattr(loaded, name))]
    assert undocumented == []


@pytest.mark.parametrize("name", squareq_fx.__all__)
def test_every_public_name_says_what_it_does_and_what_it_raises(name: str) -> None:
    value = getattr(squareq_fx, name)
    if isinstance(value, str):
        return
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        assert name in RAISE_NOTHING or "Raises:" in (inspect.getdoc(value) or "")
        _check_docstring(value)
    elif not issubclass(value, Exception):
        methods = inspect.getmembers(value, inspect.isfunction)
        for _, method in methods:
            if method.__qualname__.startswith(f"{value.__name__}.") and not method.__name__.startswith("_"):
                _check_docstring(method)


def _check_docstring(function: object) -> None:
    """A function whose own lines raise says so."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))  # type: ignore[arg-type]
    doc = inspect.getdoc(function) or ""
    if any(isinstance(node, ast.Raise) for node in ast.walk(tree)):
        assert "raise" in doc.lower(), f"{function} raises, and its docstring does not say what"


@pytest.mark.parametrize(("name", "member"), [("passes", "Quantize"), ("kernels", "reference")])
def test_a_folder_of_the_repository_is_not_a_package(name: str, member: str) -> None:
    """`import kernels` by itself must not fail: transformers asks whether a package of that name is installed."""
    code = f"from {name} import {member}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: import squareq_fx.{name} instead" in done.stderr


_PROBE = """
import json, sys, time
import torch

def refuse(*args, **kwargs):
    raise AssertionError("importing squareq_fx starts CUDA")

torch.cuda._lazy_init = refuse
before = set(sys.modules)
start, cpu = time.perf_counter(), time.process_time()
import squareq_fx
wall, cpu = time.perf_counter() - start, time.process_time() - cpu
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([wall, cpu, sorted(new), torch.cuda.is_initialized()]))
"""


def test_importing_takes_half_a_second_more_than_torch(tmp_path: Path) -> None:
    """CPU time, for other tests run beside this one; an import has one thread. The median of three."""
    runs = [_python(_PROBE, tmp_path) for _ in range(3)]
    wall, cpu, new, started_cuda = zip(*(json.loads(run) for run in runs))
    print(f"import squareq_fx after torch: {statistics.median(wall):.2f} s, {statistics.median(cpu):.2f} s of CPU time")
    assert not any(started_cuda)
    assert HEAVY.isdisjoint(new[0])
    assert statistics.median(cpu) <= MAX_IMPORT_SECONDS


def test_no_module_starts_cuda_when_imported(tmp_path: Path) -> None:
    names = [m for m in modules() if "triton" not in _imported_roots(modules()[m])]
    refuse = "import torch\ntorch.cuda._lazy_init = None  # a call is a TypeError\n"
    loop = f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    assert _python(refuse + loop + "print(torch.cuda.is_initialized())", tmp_path) == "False"


def _python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
