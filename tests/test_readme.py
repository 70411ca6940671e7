"""What the documents show runs: every python block of a file in order, in one namespace, in an empty folder.

A block after `<!-- raises: ErrorName -->` must raise that error, and the ```text block behind it be part of the message.
Functions that a document calls `test_...` are run at its end.
"""

from __future__ import annotations

import linecache
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- raises: (?P<error>\w+) -->\n+)?"
    r"^```python\n(?P<code>.*?)^```$"
    r"(?:\n+^```text\n(?P<message>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One python block; `code` begins with empty lines, so that its line numbers are the file's."""

    code: str
    line: int
    error: str | None
    message: str


def blocks(text: str) -> list[Block]:
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        message = (match["message"] or "").strip() if match["error"] else ""
        found.append(Block("\n" * line + match["code"], line + 1, match["error"], message))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"document_{path.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look for their own
    namespace = vars(module)
    for block in blocks(path.read_text(encoding="utf-8")):
        name = f"{path.name}:{block.line}"
        linecache.cache[name] = (len(block.code), None, block.code.splitlines(keepends=True), name)
        run = compile(block.code, name, "exec", dont_inherit=True)
        if block.error is None:
            exec(run, namespace)
            continue
        with pytest.raises(BaseException) as raised:
            exec(run, namespace)
        assert block.error in [cls.__name__ for cls in type(raised.value).__mro__], f"{name}: {raised.value!r}"
        assert block.message in str(raised.value), name
    for test in [value for key, value in namespace.items() if key.startswith("test_")]:
        test()


def test_the_documents_show_what_they_promise() -> None:
    """An error with its message, and links that lead somewhere."""
    readme = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert any(block.error and block.message for block in readme)
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for fence in re.findall(r"^```(\w*)", text, re.MULTILINE):
            assert fence in ("", "python", "text"), f"{path.name}: a block of {fence!r} is not run"
        prose = re.sub(r"^```.*?^```$|`[^`]*`", "", text, flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_blocks_are_found_with_their_errors() -> None:
    text = "a\n```python\nx = 1\n```\nb\n<!-- raises: ValueError -->\n\n```python\nint('x')\n```\n```text\ninvalid\n```\n"
    first, second = blocks(text)
    assert (first.code.strip(), first.line, first.error) == ("x = 1", 3, None)
    assert (second.code.strip(), second.error, second.message) == ("int('x')", "ValueError", "invalid")
