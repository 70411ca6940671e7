"""The files a class's behaviour is written in, as hashes."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

__all__ = ["UnreadableError", "package_identity", "sources"]


class UnreadableError(Exception):
    """A source file cannot be read."""


def sources(module: str, known: Container[str] = ()) -> dict[str, str]:
    """The module's file by the module's name; if it is the user's own code, also the files of own code that it imports, as far
    as that goes. A package that was installed has a version besides; a module without a file is "".

    Args:
        known: modules that need not be looked at.

    Raises:
        UnreadableError: a file is gone.
    """
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or (name in known and name != module) or not name:
            continue
        path = _path(name)
        found[name] = ""
        if path is None:
            continue
        if _is_own(path):
            found[name] = _file_hash(path)
            waiting += _imports_of(path, _package(name, path))
        elif name == module:
            version = getattr(sys.modules.get(name.partition(".")[0]), "__version__", "")
            found[name] = f"{version} {_file_hash(path)}"
    return found


def _path(module: str) -> str | None:
    """The file of a module, imported or not; no module is imported to find it."""
    loaded = sys.modules.get(module)
    if loaded is not None:
        return getattr(loaded, "__file__", None)
    parent = module.rpartition(".")[0]
    if module.partition(".")[0] in sys.stdlib_module_names or (parent and not hasattr(sys.modules.get(parent), "__path__")):
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return spec.origin if spec is not None and spec.has_location else None


def _is_own(path: str) -> bool:
    """Is it neither Python's, nor an installed package's, nor this package's (whose source counts as a whole)?"""
    folders = (sysconfig.get_paths()["stdlib"], *map(str, _own_folders()))
    installed = {"site-packages", "dist-packages"} & set(Path(path).parts)
    return not installed and not any(path.startswith(folder + os.sep) for folder in folders)


def _package(module: str, path: str) -> str:
    return module if os.path.basename(path) == "__init__.py" else module.rpartition(".")[0]


@functools.lru_cache(maxsize=4096)
def _imports_of(path: str, package: str) -> tuple[str, ...]:
    """What a file's import statements may name, wherever they stand in it."""
    if not path.endswith(".py"):
        return ()
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ()
    names: dict[str, None] = {}
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            names.update(dict.fromkeys(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            parts = above[: len(above) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names.update(dict.fromkeys([base, *(f"{base}.{alias.name}" for alias in node.names)]))
    return tuple(names)


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Every statement; an import is none of an expression's parts, which are nine tenths of a tree."""
    waiting: list[Any] = [tree]
    while waiting:
        node = waiting.pop()
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting += getattr(node, field, ())
        if isinstance(node, ast.stmt):
            yield node


@functools.lru_cache(maxsize=4096)
def _file_hash(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UnreadableError(f"the source {path}, which cannot be read") from error


@functools.cache
def _own_folders() -> tuple[Path, ...]:
    """Where this package's source lies; its parts are top-level folders of the repository, or one installed package."""
    modules = ("squareq_fx", "squareq_fx.passes", "squareq_fx.kernels")
    found = (getattr(sys.modules.get(name), "__file__", None) for name in modules)
    return tuple(Path(path).parent for path in found if path)


@functools.cache
def package_identity() -> str:
    """Of this package's own source."""
    digest = hashlib.sha256()
    for folder in _own_folders():
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]
