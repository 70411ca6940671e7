"""Damaged and hostile files: always a SlabError or the right answer, never another exception, a hang or a
wrong number.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slab_models import UPSTREAM, Mixed, copy_slab

from squareq_fx.errors import SlabError
from squareq_fx.slab import build_slab, open_slab
from squareq_fx.slab.sources import Checkpoint

SUFFIXES = (".safetensors", ".manifest.json")
HOSTILE: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**19,
    0.5,
    "",
    "x",
    "F32",
    "I8",
    [],
    {},
    [0, 1],
    [[]],
]
JSON = st.recursive(
    st.sampled_from(HOSTILE) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


class Files:
    """A good slab's bytes, its tensors, and a place to put damaged copies."""

    def __init__(self, stem: Path, target: Path) -> None:
        self.target = copy_slab(stem, target)
        self.good = {suffix: Path(f"{stem}{suffix}").read_bytes() for suffix in SUFFIXES}
        with open_slab(stem) as slab:
            self.truth = {key: slab.tensor(key).clone() for key in slab.tensors}
            self.sealed = bool(slab.segments)

    def judge(self, files: dict[str, bytes]) -> str:
        """Put the files there, open and read everything. Returns "refused" or "right", and raises for
        anything else.
        """
        for suffix in SUFFIXES:
            Path(f"{self.target}{suffix}").write_bytes(files.get(suffix, self.good[suffix]))
        try:
            with open_slab(self.target) as slab:
                slab.verify()
                found = {key: slab.tensor(key) for key in slab.tensors}
        except SlabError as error:
            str(error).encode()
            return "refused"
        if self.sealed:
            assert {**self.good, **files} == self.good or found.keys() == self.truth.keys()
            for key, tensor in found.items():
                assert torch.equal(tensor, self.truth[key]), key
        return "right"


@pytest.fixture(scope="module", params=["ours", "the original's"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("fuzz")
    if request.param == "the original's":
        return Files(UPSTREAM, directory / "s")
    torch.manual_seed(0)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    build_slab(Mixed(), directory / "good", example_inputs=(ids,), progress=False)
    return Files(directory / "good", directory / "s")


def test_the_undamaged_files(files: Files) -> None:
    assert files.judge({}) == "right"


@given(st.data())
def test_flipped_bits(files: Files, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(SUFFIXES))
    raw = bytearray(files.good[suffix])
    limit = len(raw) if data.draw(st.booleans()) else min(len(raw), 10_000)
    for position in data.draw(st.lists(st.integers(0, limit * 8 - 1), min_size=1, max_size=3, unique=True)):
        raw[position // 8] ^= 1 << position % 8
    verdict = files.judge({suffix: bytes(raw)})
    assert verdict == "refused" or not files.sealed


@given(st.data())
def test_truncated_extended_cut_and_inserted(files: Files, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(SUFFIXES))
    raw = files.good[suffix]
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
    damaged = data.draw(
        st.sampled_from(
            [
                raw[:a],
                raw[a:],
                raw[:a] + raw[b:],
                raw + raw[a:b],
                raw[:a] + b"\0" * 8 + raw[a:],
                raw[:b] + raw[a:],
            ]
        )
    )
    verdict = files.judge({suffix: damaged})
    assert verdict == "refused" or damaged == raw or not files.sealed


@given(st.data())
def test_swapped_ranges_of_data(files: Files, data: st.DataObject) -> None:
    raw = files.good[".safetensors"]
    start = 8 + int.from_bytes(raw[:8], "little")
    size = data.draw(st.integers(1, 500))
    a, b = data.draw(st.tuples(*[st.integers(start, len(raw) - size)] * 2))
    damaged = bytearray(raw)
    damaged[a : a + size], damaged[b : b + size] = raw[b : b + size], raw[a : a + size]
    verdict = files.judge({".safetensors": bytes(damaged)})
    assert verdict == "refused" or bytes(damaged) == raw or not files.sealed


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_noise(files: Files, data: bytes, manifest: bytes) -> None:
    assert files.judge({".safetensors": data, ".manifest.json": manifest}) == "refused"
    assert files.judge({".safetensors": len(data).to_bytes(8, "little") + data}) == "refused"


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(document, dict | list):
        return [path]
    inner: Any = document.items() if isinstance(document, dict) else enumerate(document)
    return [path, *(p for key, value in inner for p in places(value, (*path, key)))]


def damage(document: Any, data: st.DataObject) -> Any:
    """Replace, delete, double or move one random value anywhere in a JSON document."""
    document = copy.deepcopy(document)
    path = data.draw(st.sampled_from([p for p in places(document) if p]))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    action = data.draw(st.sampled_from(["replace", "replace", "delete", "swap"]))
    if action == "delete":
        del parent[path[-1]]
    elif action == "swap":
        other = data.draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
        parent[path[-1]], parent[other] = parent[other], parent[path[-1]]
    else:
        parent[path[-1]] = data.draw(JSON)
    return document


def with_header(raw: bytes, edit: Callable[[Any], Any], seal: bool) -> bytes:
    """The file with another header; sealed again if asked, as somebody who knows the format would."""
    length = int.from_bytes(raw[:8], "little")
    text = json.dumps(edit(json.loads(raw[8 : 8 + length]))).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    marker = b'header_sha256\\": \\"'
    if seal and marker in text:
        start = text.index(marker) + len(marker)
        zeroed = text[:start] + b"0" * 64 + text[start + 64 :]
        text = zeroed[:start] + hashlib.sha256(zeroed).hexdigest().encode() + zeroed[start + 64 :]
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


@given(st.data())
def test_headers_with_one_thing_wrong(files: Files, data: st.DataObject) -> None:
    raw = with_header(files.good[".safetensors"], lambda header: damage(header, data), seal=False)
    verdict = files.judge({".safetensors": raw})
    assert verdict == "refused" or not files.sealed


@given(st.data())
def test_sealed_extras_with_one_thing_wrong(files: Files, data: st.DataObject) -> None:
    def edit(header: Any) -> Any:
        if files.sealed:
            extras = damage(json.loads(header["__metadata__"]["squareq_fx"]), data)
        else:
            extras = data.draw(JSON)
        header.setdefault("__metadata__", {})["squareq_fx"] = json.dumps(extras)
        return header

    files.judge({".safetensors": with_header(files.good[".safetensors"], edit, seal=True)})


@given(st.data())
def test_manifests_with_one_thing_wrong(files: Files, data: st.DataObject) -> None:
    manifest = damage(json.loads(files.good[".manifest.json"]), data)
    text = json.dumps(manifest, indent=2).encode()
    verdict = files.judge({".manifest.json": text})
    assert verdict == "refused" or text == files.good[".manifest.json"] or not files.sealed


DEEP = b"[" * 100_000
BOMBS = {
    "deep list": b'{"a":' + DEEP + b"]" * 100_000 + b"}",
    "deep and open": b'{"a":' + DEEP,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "long integer": b'{"a":' + b"9" * 1_000_000 + b"}",
    "huge float": b'{"a":1e999999999}',
    "NaN": b'{"a":NaN}',
    "infinity": b'{"a":-Infinity}',
    "key twice": b'{"a":1,"a":1}',
    "not UTF-8": b'{"\xff\xfe":1}',
    "overlong UTF-8": b'{"\xc0\xaf":1}',
    "half a surrogate pair": b'{"\\ud800":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}',
    "surrogate in a value": b'{"__metadata__":{"a":"\\uDFFF"}}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "two documents": b"{}{}",
    "a list": b"[]",
    "a null byte": b"{}\0",
    "nothing": b"",
    "many dimensions": b'{"a":{"dtype":"I8","shape":[' + b"9," * 100_000 + b'9],"data_offsets":[0,1]}}',
    "empty but huge": b'{"a":{"dtype":"I8","shape":[0,4611686018427387904,2],"data_offsets":[0,0]}}',
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_bombs(name: str, files: Files, tmp_path: Path) -> None:
    bomb = BOMBS[name]
    assert files.judge({".manifest.json": bomb}) == "refused"
    data = len(bomb).to_bytes(8, "little") + bomb
    assert files.judge({".safetensors": data}) == "refused"
    (tmp_path / "source.safetensors").write_bytes(data)
    with pytest.raises(SlabError):
        build_slab(tmp_path / "source.safetensors", tmp_path / "s", model_class=Mixed, progress=False)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001])
def test_lying_header_lengths(length: int, files: Files) -> None:
    raw = length.to_bytes(8, "little") + files.good[".safetensors"][8:]
    assert files.judge({".safetensors": raw}) == "refused"


ENTRY = {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"a": ENTRY, "b": ENTRY}, "overlaps"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [5, 9]}}, "hole"),
        ({"a": {**ENTRY, "data_offsets": [4, 8]}}, "hole"),
        ({"a": {**ENTRY, "data_offsets": [4, 0]}}, "span -4"),
        ({"a": {**ENTRY, "data_offsets": [-4, 0]}}, "data_offsets must be"),
        ({"a": {**ENTRY, "data_offsets": [0, 4, 8]}}, "data_offsets must be"),
        ({"a": {**ENTRY, "data_offsets": [0.0, 4]}}, "data_offsets must be"),
        ({"a": {**ENTRY, "data_offsets": [False, 4]}}, "data_offsets must be"),
        ({"a": {**ENTRY, "shape": [-4]}}, "shape must be"),
        ({"a": {**ENTRY, "shape": [True, 4]}}, "shape must be"),
        ({"a": {**ENTRY, "shape": "4"}}, "shape must be"),
        ({"a": {**ENTRY, "shape": [5]}}, "takes 5 bytes"),
        ({"a": {**ENTRY, "dtype": "F31"}}, "unknown dtype"),
        ({"a": {**ENTRY, "dtype": ["I8"]}}, "unknown dtype"),
        ({"a": {**ENTRY, "extra": 1}}, "exactly dtype"),
        ({"a": None}, "exactly dtype"),
        ({"a": ENTRY, "__metadata__": {"x": 1}}, "strings to strings"),
        ({"a": ENTRY, "__metadata__": None}, "strings to strings"),
    ],
)
def test_each_rule_of_the_header(entries: dict[str, Any], expected: str, tmp_path: Path) -> None:
    text = json.dumps(entries).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 9)
    with pytest.raises(SlabError, match=expected):
        Checkpoint([file])
