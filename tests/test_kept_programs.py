"""kept: a second compile finds what Inductor made of each function, with the same bits; whatever counts has its own key."""

from __future__ import annotations

import functools
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any, ClassVar

import laws
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Mlp, Norm, Residual, Seq, Spec, make_slab, scratch
from torch import fx, nn

import squareq_fx
from squareq_fx.lowering import inductor
from squareq_fx.lowering.kept import KeptPrograms, program_code_key
from squareq_fx.lowering.portable import Loaded, _hash, _kernels, load, tuned
from squareq_fx.lowering.symbols import sizes_of
from squareq_fx.slab import Slab
from squareq_fx.stored.code import StoredCode, read_code, write_code
from squareq_fx.stored.errors import DamagedError

SPEC = Spec(Residual(Seq((Norm(), Mlp(24)))), repeat=2)
SIZES = ((2, 5, 3), (1, 9, 4))

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("quick_compiler")


@functools.cache
def model_and_slab() -> tuple[nn.Module, Slab]:
    model = SPEC.build()
    return model, make_slab(model, SPEC.inputs())


def compiled(cache: Path | bool) -> squareq_fx.CompiledModule:
    options: Any = {"example_inputs": SPEC.inputs(), "backend": "inductor", "progress": False}
    return squareq_fx.compile(*model_and_slab(), cache=cache, **options)


def outputs(module: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [module(**SPEC.inputs(*sizes)) for sizes in SIZES]


def codes(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.code"))


@pytest.fixture(scope="module")
def first(quick_compiler: None) -> tuple[Path, list[inductor.Compilation], list[torch.Tensor]]:
    """A folder, and what the compile that filled it compiled and computed."""
    folder = scratch("programs")
    module = compiled(folder)
    return folder, list(module.lowering.compilations), outputs(module)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the compiler ran")

    monkeypatch.setattr(inductor, "_compiled", refuse)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each run of the compiler."""
    done: list[Any] = []
    original = inductor._compiled

    def counted(body: fx.Graph, world: Any) -> Any:
        done.append(body)
        return original(body, world)

    monkeypatch.setattr(inductor, "_compiled", counted)
    return done


# ---------------------------------------------------------------------------------------------------------- the same bits


def test_a_second_compile_runs_no_compiler_and_computes_the_same_bits(first: Any, no_compiler: None) -> None:
    folder, before, expected = first
    assert len(codes(folder)) == len(before) > 1 and not any(c.kept for c in before)
    module = compiled(folder)
    found = module.lowering.compilations
    assert all(c.kept for c in found)
    told = [replace(c, seconds=0.0, kept=False) for c in found]
    assert told == [replace(c, seconds=0.0) for c in before], "one compilation for each function, with the same words"
    assert laws.same(outputs(module), expected)


_SECOND = """
import json, sys
import torch
import test_kept_programs as here
from torch._inductor import config

config.cpp.simdlen, config.compile_threads = 1, 1
torch.set_num_threads(int(sys.argv[2]))
module = here.compiled(here.Path(sys.argv[1]))
found = [o.double().sum().item().hex() for o in here.outputs(module)]
assert "diffusers" not in sys.modules
kept = [c.kept for c in module.lowering.compilations]
print(json.dumps([kept, found, "torch._inductor.lowering" in sys.modules]))
"""


def test_a_second_process_finds_them_and_loads_no_compiler(first: Any) -> None:
    folder, before, expected = first
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", _SECOND, str(folder), str(torch.get_num_threads())]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    kept, found, has_compiler = json.loads(process.stdout.splitlines()[-1])
    assert kept == [True] * len(before)
    assert found == [o.double().sum().item().hex() for o in expected]
    assert not has_compiler


def test_products_of_torch_are_called_without_the_compiler(tmp_path: Path) -> None:
    linear = function(lambda x, w: aten.mm.default(aten.sin.default(x), w), (6, 8), (8, 4))
    kept, noted = KeptPrograms(tmp_path), []
    inputs = torch.randn(6, 8), torch.randn(8, 4)
    expected = inductor.compile_function("product", linear, noted.append, programs=kept)(*inputs)
    code = read_code(codes(tmp_path)[0].read_bytes(), codes(tmp_path)[0].stem)
    assert code.ours == ("mm",) and code.theirs == () and "import extern_kernels" not in code.source
    again = inductor.compile_function("product", linear, noted.append, programs=kept)
    assert [c.kept for c in noted] == [False, True]
    assert torch.equal(again(*inputs), expected) and torch.allclose(expected, inputs[0].sin() @ inputs[1], atol=1e-5)


def test_other_functions_of_inductor_are_taken_from_it(tmp_path: Path) -> None:
    code = StoredCode("def call(args): return (extern_kernels.convolution,)", (), ("convolution",), (), (), "", b"")
    from torch._inductor.select_algorithm import extern_kernels

    assert load(code, "one").run()[0] is extern_kernels.convolution


def test_a_misaligned_input_is_copied_where_the_program_asks_for_it() -> None:
    source = "def call(args):\n    return tuple(a.data_ptr() % 16 for a in args)"
    # Inductor's own rule: an address that is no multiple of 16 bytes
    x = torch.randn(9)[1:]
    assert load(StoredCode(source, (), (), (0,), (), "", b""), "one").run(x, x) == (0, x.data_ptr() % 16)


@pytest.mark.parametrize("what", ["portable", "load"])
def test_a_program_that_cannot_be_taken_out_runs_in_its_wrappers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def no(*_: Any, **__: Any) -> Any:
        raise {"portable": AttributeError, "load": DamagedError}[what]("not here")

    monkeypatch.setattr(*{"portable": ("squareq_fx.lowering.portable._is_plain", no), "load": (inductor, "load", no)}[what])
    noted: list[inductor.Compilation] = []
    gm = function(lambda x: aten.cos.default(x), (5, 3))
    run = inductor.compile_function("cos", gm, noted.append, programs=KeptPrograms(tmp_path))
    x = torch.randn(5, 3)
    assert torch.allclose(run(x), x.cos()) and len(noted) == 1 and not codes(tmp_path)


@pytest.mark.parametrize("found", [False, True])
def test_a_program_that_does_not_run_without_its_wrappers_is_compiled_again_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bool
) -> None:
    """Whether it was just made or found; once, and for the sizes it was for."""
    gm = function(lambda x: aten.cos.default(x), (5, 3))
    if found:
        inductor.compile_function("cos", gm, lambda _: None, programs=KeptPrograms(tmp_path))

    def broken(*_: Any) -> Any:
        raise TypeError("no such launcher")

    monkeypatch.setattr(inductor, "load", lambda *_, **__: Loaded(broken))
    noted: list[inductor.Compilation] = []
    run = inductor.compile_function("cos", gm, noted.append, programs=KeptPrograms(tmp_path))
    x = torch.randn(5, 3)
    with pytest.warns(UserWarning, match=r"the program of cos does not run here \(TypeError: no such launcher\)"):
        assert torch.allclose(run(x), x.cos())
    assert [c.kept for c in noted] == [found, False] and not codes(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(run(x), x.cos()) and len(noted) == 2


@pytest.mark.parametrize(("wrapped", "error"), [(False, torch.OutOfMemoryError), (True, RuntimeError)])
def test_no_memory_and_what_goes_wrong_in_the_wrappers_is_raised_and_nothing_compiled_again(
    monkeypatch: pytest.MonkeyPatch, wrapped: bool, error: type[Exception]
) -> None:
    made: list[Any] = []

    def broken(*_: Any) -> Any:
        raise error("on purpose")

    def compiler(*_: Any) -> Any:
        made.append(Namespace(_compiled_fn=broken))
        return made[-1]

    monkeypatch.setattr(inductor, "_compiled", compiler)
    monkeypatch.setattr(inductor, "portable", lambda *_: None if wrapped else replace(CODE, fixed=(), condition=""))
    monkeypatch.setattr(inductor, "load", lambda *_, **__: Loaded(broken))
    run = inductor.compile_function("cos", function(lambda x: aten.cos.default(x), (5, 3)), lambda _: None)
    for _ in range(2):
        with pytest.raises(error, match="on purpose"):
            run(torch.randn(5, 3))
    assert len(made) == 1


# ----------------------------------------------------------------------------------------------------------------- damage


CODE = StoredCode("text", ("mm",), ("conv",), (1,), (0,), "L['t0'] < 4", b"\x00kernels")


@given(st.data())
def test_every_flipped_bit_is_noticed(data: st.DataObject) -> None:
    written = bytearray(write_code(CODE, "key"))
    assert read_code(bytes(written), "key") == CODE
    place = data.draw(st.integers(0, len(written) - 1))
    written[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedError):
        read_code(bytes(written), "key")


@given(st.integers(0, 300))
def test_every_cut_is_noticed(length: int) -> None:
    written = write_code(CODE, "key")
    with pytest.raises(DamagedError):
        read_code(written[: min(length, len(written) - 1)], "key")


def test_an_entry_under_another_name_is_refused() -> None:
    with pytest.raises(DamagedError, match="another key"):
        read_code(write_code(CODE, "key"), "other")


def _flipped(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


def _raising(path: Path) -> bytes:
    code = read_code(path.read_bytes(), path.stem)
    return write_code(replace(code, source="from torch._inductor import gone"), path.stem)


@pytest.mark.parametrize("spoil", [_flipped, _raising, lambda path: b""])
def test_what_cannot_be_used_is_told_compiled_again_and_replaced(
    first: Any, runs: list[Any], spoil: Callable[[Path], bytes]
) -> None:
    folder, before, expected = first
    path = codes(folder)[0]
    path.write_bytes(spoil(path))
    with pytest.warns(UserWarning, match=f"{path.name} cannot be used and is compiled again"):
        module = compiled(folder)
    assert len(runs) == 1 and sum(c.kept for c in module.lowering.compilations) == len(before) - 1
    assert laws.same(outputs(module), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(c.kept for c in compiled(folder).lowering.compilations)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="a compiled program is not kept"):
        KeptPrograms(tmp_path / "file" / "below").put("key", CODE)


def test_the_least_used_go_first(tmp_path: Path) -> None:
    size = len(write_code(CODE, "a"))
    kept = KeptPrograms(tmp_path, limit=2 * size)
    for at, key in enumerate("ab"):
        kept.put(key, CODE)
        os.utime(tmp_path / f"{key}.code", (at, at))
    assert kept.get("a", lambda code: Loaded(len)) == (CODE, Loaded(len)), "it is used now"
    kept.put("c", CODE)
    assert [path.stem for path in codes(tmp_path)] == ["a", "c"]


def test_no_cache_no_files(first: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: list[Any]) -> None:
    monkeypatch.setenv("SQUAREQ_CACHE_DIR", str(tmp_path))
    module = compiled(False)
    assert not any(c.kept for c in module.lowering.compilations) and len(runs) == len(module.lowering.compilations)
    monkeypatch.setenv("SQUAREQ_CACHE", "0")
    assert KeptPrograms.of(True) is None and not list(tmp_path.iterdir())
    monkeypatch.setenv("SQUAREQ_CACHE", "1")
    kept = KeptPrograms.of(True)
    assert kept is not None and kept.folder == tmp_path / "programs"


# --------------------------------------------------------------------------------------------------------- Triton's kernels


def test_of_a_tuned_kernel_the_fastest_variant_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Inductor's own cache, which holds the result, is gone: the second process must not tune again."""
    pytest.importorskip("triton")
    from torch._inductor.triton_bundler import StaticallyLaunchedAutotuner, TritonBundle, TritonKernelArtifacts

    def kernel(*hashes: str) -> Any:
        variants = [Namespace(kernel=Namespace(hash=one)) for one in hashes]
        return Namespace(compile_results=variants, inductor_meta={})

    named = [("twice", kernel("aa")), ("tuned", kernel("bb", "cc")), ("other", kernel("dd", "ee")), ("twice", kernel("aa"))]
    hashes = {name: _hash(Namespace(kernel=Namespace(hash=name))) for name in ("aa", "bb", "cc", "dd", "ee", "ff")}
    files = [TritonKernelArtifacts(one, 0, []) for one in hashes.values()]  # of "ff" nothing else is known
    bundle = TritonBundle(2 * files, [StaticallyLaunchedAutotuner(name, name, one) for name, one in named])

    def held(kernels: bytes) -> tuple[dict[str, list[str]], list[str]]:
        found = pickle.loads(kernels)
        assert len(found.static_autotuners) == 3
        variants = {one.cache_key: [v.kernel.hash for v in one.kernel.compile_results] for one in found.static_autotuners}
        return variants, [one.kernel_hash for one in found.kernel_artifacts]

    code = replace(CODE, kernels=_kernels(bundle))
    every = {"twice": ["aa"], "tuned": ["bb", "cc"], "other": ["dd", "ee"]}
    assert held(code.kernels) == (every, [*hashes.values()])
    assert _kernels(None) == _kernels(TritonBundle([], [])) == b""

    def measured(*fastest: str) -> Any:
        return Namespace(launchers=[Namespace(cache_hash=hashes.get(one, one)) for one in fastest])

    faster = tuned(code, [measured("cc"), measured("dd", "ee")])
    assert faster is not None and replace(faster, kernels=code.kernels) == code
    assert held(faster.kernels) == (every | {"tuned": ["cc"]}, [hashes[name] for name in ("aa", "cc", "dd", "ee", "ff")])
    assert tuned(faster, [measured("cc")]) is None, "it says so already"
    several, unnamed = measured("dd", "ee"), Namespace(launchers=[object()])
    for unknown in ([], [several], [measured("a variant of later")], [measured("aa")], [unnamed]):
        assert tuned(code, unknown) is None
    assert tuned(CODE, []) is None and tuned(replace(CODE, kernels=b""), [measured("cc")]) is None
    told: list[Any] = []
    monkeypatch.setattr("squareq_fx.lowering.portable._LOG.warning", lambda *words: told.append(words[1]))
    assert tuned(CODE, [measured("cc")]) is None, "an Inductor with other pickles does not fail the call"
    assert told == ["UnpicklingError"]


def test_what_the_first_call_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, after the call, and only of kernels that had several variants."""
    original, asked = inductor.load, []

    class Kernel:
        launchers: ClassVar[list[int]] = [1, 2]

    def loaded(code: StoredCode, name: str) -> Loaded:
        program = original(code, name)
        return Loaded(program.run, (Kernel,)) if name == "several" else program

    def measured(code: StoredCode, untuned: Any) -> StoredCode:
        asked.append(untuned)
        return replace(code, kernels=b"the fastest")

    monkeypatch.setattr(inductor, "load", loaded)
    monkeypatch.setattr(inductor, "tuned", measured)
    for name, expected in (("one", []), ("several", [(Kernel,)])):
        folder = tmp_path / name
        gm = function(lambda x: aten.cos.default(x), (5, 3))
        run = inductor.compile_function(name, gm, lambda _: None, programs=KeptPrograms(folder))
        (path,) = codes(folder)
        assert read_code(path.read_bytes(), path.stem).kernels == b""
        for rows in (5, 5, 7):
            run(torch.randn(rows, 3))
        assert asked == expected
        assert read_code(path.read_bytes(), path.stem).kernels == (b"the fastest" if expected else b"")


@pytest.mark.parametrize("variants", [1, 2])
def test_a_program_kept_with_several_variants_tells_its_kernels(monkeypatch: pytest.MonkeyPatch, variants: int) -> None:
    """Also one that Inductor's own cache has left one launcher: where that is gone the next process would tune."""
    pytest.importorskip("triton")
    from torch._inductor.triton_bundler import StaticallyLaunchedAutotuner, TritonBundle, TritonBundler

    def settles(bundle: Any) -> None:
        for one in bundle.static_autotuners:
            del one.kernel.compile_results[1:]

    monkeypatch.setattr(TritonBundler, "read_and_emit", settles)
    kernel = Namespace(compile_results=[Namespace(kernel=Namespace(hash=one)) for one in ("aa", "bb")[:variants]])
    kernels = pickle.dumps(TritonBundle([], [StaticallyLaunchedAutotuner("key", "one", kernel)]))
    source = """
class Kernel:
    def __init__(self, *launchers): self.launchers = [*launchers]
settled, untuned, unloaded, launchers = Kernel(1), Kernel(1, 2), Kernel(), [1, 2]
def call(args): return settled, untuned
"""
    program = load(StoredCode(source, (), (), (), (), "", kernels), "kernels")
    assert program.untuned == (program.run() if variants > 1 else ())


def test_a_program_finds_its_kernels_and_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config
    from torch._inductor.triton_bundler import TritonBundle, TritonKernelArtifact, TritonKernelArtifacts

    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch.utils._triton.triton_hash_with_backend", lambda: "asks the card")
    bundle = TritonBundle([TritonKernelArtifacts("KEY", 0, [TritonKernelArtifact("kernel.cubin", b"binary")])], [])
    source = (
        "import os\nfrom torch._inductor import config\n"
        "found = config.compile_threads, os.environ['TRITON_CACHE_DIR']\n"
        "def call(args): return found"
    )
    with config.patch(compile_threads=7):
        threads, folder = load(StoredCode(source, (), (), (), (), "", pickle.dumps(bundle)), "one").run()
        assert (threads, config.compile_threads) == (1, 7)
    assert (Path(folder) / "KEY" / "kernel.cubin").read_bytes() == b"binary" and Path(folder).is_relative_to(tmp_path)


def test_names_of_kernels_are_shorter_than_triton_writes_files() -> None:
    from torch._inductor import config
    from torch._inductor.utils import get_fused_kernel_name
    from torch.utils._ordered_set import OrderedSet

    names = ["abs", "amax", "native_layer_norm", "reciprocal", "round", "scaled_dot_product_attention", "unsqueeze", "where"]
    graph = fx.Graph()
    for name in names:
        packet = getattr(aten, name)
        graph.call_function(packet).meta["original_aten"] = getattr(packet, packet.overloads()[0])
    schedule: Any = [Namespace(node=Namespace(origins=OrderedSet(graph.nodes)))]
    with config.patch(inductor._options()["config_patches"]):
        assert len(get_fused_kernel_name(schedule, config.triton.descriptive_names)) < 50


# ----------------------------------------------------------------------------------------------------------------- the key


def function(body: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """A function of operations that `body` calls, on tensors of these shapes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(body, tracing_mode="fake")(*(torch.empty(shape, dtype=dtype) for shape in shapes))
    return gm


def key_of(gm: fx.GraphModule, tuned: tuple[int, ...] = (), settings: Any = None) -> str | None:
    values = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    return program_code_key(gm.graph, values, sizes_of(values), tuned, settings)


def plain() -> fx.GraphModule:
    return function(lambda x: aten.add.Tensor(aten.sum.dim_IntList(x, [1]), 1), (3, 4))


def test_names_do_not_count() -> None:
    renamed = plain()
    for node in renamed.graph.nodes:
        node.name = f"other_{node.name}"
    assert key_of(renamed) == key_of(plain()) is not None


@pytest.mark.parametrize(
    "other",
    [
        lambda: function(lambda x: aten.add.Tensor(aten.sum.dim_IntList(x, [1]), 1.0), (3, 4)),
        lambda: function(lambda x: aten.add.Tensor(aten.sum.dim_IntList(x, [1]), True), (3, 4)),
        lambda: function(lambda x: aten.add.Tensor(aten.sum.dim_IntList(x, [0]), 1), (3, 4)),
        lambda: function(lambda x: aten.sub.Tensor(aten.sum.dim_IntList(x, [1]), 1), (3, 4)),
        lambda: function(lambda x: aten.add.Tensor(aten.sum.dim_IntList(x, [1]), 1), (3, 5)),
        lambda: function(lambda x: aten.add.Tensor(aten.sum.dim_IntList(x, [1]), 1), (3, 4), dtype=torch.float64),
        lambda: function(lambda x, y: aten.add.Tensor(aten.sum.dim_IntList(x, [1]), 1), (3, 4), (1,)),
        lambda: function(lambda x: aten.add.Tensor(aten.sum.dim_IntList(x.t(), [1]), 1), (4, 3)),
    ],
)
def test_operations_arguments_and_types_count(other: Callable[[], fx.GraphModule]) -> None:
    assert key_of(other()) not in (None, key_of(plain()))


def test_which_value_an_operation_reads_counts() -> None:
    one = function(lambda x, y: aten.sub.Tensor(x, y), (3,), (3,))
    assert key_of(one) != key_of(function(lambda x, y: aten.sub.Tensor(y, x), (3,), (3,)))


def test_sizes_and_options_count() -> None:
    gm = plain()
    assert len({key_of(gm, (2,)), key_of(gm, (3,)), key_of(gm, (2,), {"a": 1}), key_of(gm, (2,), {"a": 2})}) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.setattr(torch, "__version__", "9.9"),
        lambda m: m.setattr(torch.version, "git_version", "other"),
        lambda m: m.setattr("squareq_fx.stored.surroundings.package_identity", lambda: "other"),
        lambda m: m.setattr("squareq_fx.stored.surroundings._triton", lambda: "9.9"),
        lambda m: m.setattr("platform.python_version", lambda: "4.0"),
        lambda m: m.setattr(torch, "get_num_threads", lambda: 1234),
        lambda m: m.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other"),
        lambda m: m.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True),
        lambda m: m.setenv("TORCHINDUCTOR_SOMETHING", "1"),
        lambda m: m.setenv("CXX", "other"),
    ],
)
def test_surroundings_count(monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]) -> None:
    before = key_of(plain())
    change(monkeypatch)
    assert key_of(plain()) != before


def test_settings_of_inductor_count() -> None:
    from torch._inductor import config

    before = key_of(plain())
    with config.patch(epilogue_fusion=not config.epilogue_fusion):
        assert key_of(plain()) != before
    assert key_of(plain()) == before


@pytest.mark.parametrize(
    "name", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME", "TRITON_CACHE_DIR", "TRITON_PTXAS_PATH", "TRITON_LIBDEVICE_PATH"]
)
def test_where_things_are_kept_does_not_count(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Inductor itself sets most of these when it compiles its first kernel; a second process compiles none."""
    before = key_of(plain())
    monkeypatch.setenv(name, "elsewhere")
    assert key_of(plain()) == before


@pytest.mark.parametrize("threads", [None, 3])
def test_how_many_processes_compile_does_not_count(threads: int | None) -> None:
    """Inductor decides it by the processor, when it first compiles."""
    from torch._inductor import config

    before = key_of(plain())
    with config.patch(compile_threads=threads):
        assert key_of(plain()) == before


def test_an_operation_that_nobody_knows_has_no_key(tmp_path: Path) -> None:
    with torch.library._scoped_library("kept_programs", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
        library._register_fake("twice", torch.empty_like)
        gm = function(lambda x: torch.ops.kept_programs.twice.default(aten.sin.default(x)), (3,))
        assert key_of(gm) is None
        noted: list[inductor.Compilation] = []
        run = inductor.compile_function("twice", gm, noted.append, programs=KeptPrograms(tmp_path))
        x = torch.randn(3)
        assert torch.allclose(run(x), 2 * x.sin()) and not noted[0].kept and not codes(tmp_path)


@pytest.mark.gpu
def test_on_a_card_a_second_process_finds_programs_and_kernels(tmp_path: Path) -> None:
    """Triton's kernels come with the program: also where Inductor's and Triton's own caches are empty."""
    script = """
import json, os, sys
import torch
from pathlib import Path
import test_kept_programs as here
module = here.squareq_fx.compile(*here.model_and_slab(), cache=Path(sys.argv[1]), device="cuda", backend="inductor",
    example_inputs=here.SPEC.inputs(), progress=False)
with torch.no_grad():
    outputs = [module(**{k: v.cuda() for k, v in here.SPEC.inputs(*sizes).items()}) for sizes in here.SIZES]
from torch._dynamo.utils import counters
from torch._inductor import async_compile
found = counters["inductor"]
print(json.dumps([[c.kept for c in module.lowering.compilations], [o.double().sum().item().hex() for o in outputs],
    "torch._inductor.lowering" in sys.modules,
    [found["async_compile_cache_miss"] - found["async_compile_cache_hit"], len(async_compile._pool_set)]]))
"""
    rows = []
    for run in ("cold", "warm", "warm"):
        caches = {name: str(tmp_path / f"{name}{len(rows) // 2}") for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = os.environ | caches | {"PYTHONPATH": path}
        command = [sys.executable, "-c", script, str(tmp_path / "programs")]
        process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, (run, process.stderr)
        rows.append(json.loads(process.stdout.splitlines()[-1]))
    assert [set(row[0]) for row in rows] == [{False}, {True}, {True}]
    assert rows[0][1] == rows[1][1] == rows[2][1]
    assert [row[2] for row in rows] == [True, False, False]
    assert [row[3] for row in rows[1:]] == [[0, 0], [0, 0]], "no kernel was compiled, and no process to compile started"
