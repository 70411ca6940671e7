"""The command line: what it prints and returns, and that a known error never shows a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slab_models import UPSTREAM, UPSTREAM_WEIGHTS, Mixed
from typer.testing import CliRunner, Result

from squareq_fx.cli import app
from squareq_fx.slab import build_slab, open_slab

TINY = "slab_models:TinyNet"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    build_slab(Mixed(), tmp_path / "mixed", example_inputs=(ids,), progress=False).close()
    return tmp_path / "mixed"


def test_build_with_every_option(tmp_path: Path) -> None:
    options = ["--model-class", TINY, "--include-prefix", "blocks.", "--exclude", "*.ff.2", "--pack-k", "1"]
    more = [
        "--block-pattern",
        r"blocks\.[01]",
        "--no-passthrough",
        "--architecture-id",
        "tiny",
        "--no-progress",
    ]
    output = run("build", UPSTREAM_WEIGHTS, tmp_path / "s", *options, *more).output
    assert "quantised layers" in output and "4292d775a492f155" in output
    with open_slab(tmp_path / "s") as slab:
        assert list(slab.layers) == [f"blocks.{i}.{n}" for i in range(3) for n in ("ff.0", "proj")]
        assert slab.passthrough == {} and slab.block_paths == ("blocks.0", "blocks.1")
        assert slab.manifest.architecture_id == "tiny" and slab.layers["blocks.0.proj"].pad_k == 1


@pytest.mark.parametrize("spec", ["slab_models:Nothing", "no_such_module:x", "slab_models", ":x", ""])
def test_a_model_class_that_is_none(spec: str, tmp_path: Path) -> None:
    result = run("build", UPSTREAM_WEIGHTS, tmp_path / "s", "--model-class", spec, code=1)
    assert "error:" in result.stderr and "model" in result.stderr


def test_build_says_what_is_wrong(tmp_path: Path) -> None:
    result = run("build", tmp_path / "nothing", tmp_path / "s", code=1)
    assert "does not exist" in result.stderr
    result = run("build", UPSTREAM_WEIGHTS, tmp_path / "s", "--model-class", TINY, "--exclude", "[x", code=1)
    assert "'[x' matches no Linear layer" in result.stderr


def test_inspect(mixed: Path) -> None:
    output = run("inspect", mixed).output
    for expected in (
        "Mixed",
        "blocks.1.inner",
        "33 x 20",
        "glue.unused",
        "0.9999",
        "segments in execution order",
    ):
        assert expected in output
    assert "quantised layers" in run("inspect", f"{UPSTREAM}.manifest.json").output


def test_inspect_as_json(mixed: Path) -> None:
    document = json.loads(run("inspect", mixed, "--json").output)
    with open_slab(mixed) as slab:
        assert set(document["layers"]) == set(slab.layers)
        assert document["layers"]["blocks.0.inner"]["fidelity"]["cosine"] > 0.999
        assert [s["name"] for s in document["segments"]] == [s.name for s in slab.segments]
        assert document["aliases"]["out.weight"] == "embed.weight"
        assert document["passthrough"]["count"] == {"dtype": "int64", "shape": []}
        assert document["input_signature"]["args"][0]["tensor"]["dtype"] == "int64"
    original = json.loads(run("inspect", UPSTREAM, "--json").output)
    assert original["segments"] == [] and original["layers"]["head"]["fidelity"] is None


def test_verify(mixed: Path) -> None:
    with open_slab(mixed) as slab:
        assert f"all {len(slab.tensors)} tensors match" in run("verify", mixed).output
    assert "no checksums" in run("verify", UPSTREAM).output


def test_verify_lists_every_bad_tensor(mixed: Path) -> None:
    with open_slab(mixed) as slab:
        start = slab.path.stat().st_size - slab.data.numel()
        positions = [start + slab.tensors[key].offset for key in ("conv.weight", "blocks.1.back.qweight")]
    raw = bytearray(Path(f"{mixed}.safetensors").read_bytes())
    for position in positions:
        raw[position] ^= 4
    Path(f"{mixed}.safetensors").write_bytes(raw)
    result = run("verify", mixed, code=1)
    assert "'conv.weight'" in result.stderr and "'blocks.1.back.qweight'" in result.stderr
    raw[100] ^= 1
    Path(f"{mixed}.safetensors").write_bytes(raw)
    for command in ("verify", "inspect"):
        assert "checksum" in run(command, mixed, code=1).stderr


def test_no_arguments_is_help() -> None:
    output = CliRunner().invoke(app, []).output
    assert all(command in output for command in ("build", "inspect", "verify", "demo"))


def test_importing_is_light() -> None:
    code = "import sys, squareq_fx.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert not {"diffusers", "transformers", "triton", "matplotlib"} & set(loaded.stdout.split())


def test_the_installed_command(mixed: Path) -> None:
    command = [sys.executable, "-c", "from squareq_fx.cli import app; app()", "verify", str(mixed) + "x"]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert result.returncode == 1 and result.stderr.startswith("error: no slab at")
