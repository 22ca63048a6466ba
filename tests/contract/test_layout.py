"""The layout: which package may import which, and what an import may bring along."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("concepts", "offline", "service", "demo", "benchmarks", "whence")
SOURCES = {name: ROOT / ("clients/python/whence" if name == "whence" else name) for name in OURS}

ARROWS: dict[str, set[str]] = {
    "concepts": set(),
    "offline": {"concepts"},
    "service": {"concepts", "whence.v1"},
    "demo": {"concepts"},
    "benchmarks": {"concepts", "offline", "demo", "whence"},
    "whence": {"whence.v1"},
    "whence.v1": set(),
}
"""Whom each package may import, besides itself. No part of the product may import ``offline`` or ``service``."""

RUN_OF_THE_DEMO = [ROOT / "demo/run.py", ROOT / "demo/page.py"]
"""These use the product from outside, as its users do: they alone in ``demo`` may import the SDK."""

TRANSPORT = {"ray", "grpc", "grpc_health", "grpc_reflection", "grpc_status", "fastapi", "starlette", "google"}
HEAVY = {"torch", "torchvision", "bcos", "ray", "scipy", "safetensors"}


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of everything that a module imports, at its top or within."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def modules(package: str) -> Iterator[tuple[Path, str]]:
    """Yield the files of a package, each with the dotted package that it lies in."""
    for path in sorted(SOURCES[package].rglob("*.py")):
        yield path, ".".join([package, *path.relative_to(SOURCES[package]).parts[:-1]])


def place(name: str) -> str | None:
    """Return which of our packages a name belongs to; the stubs are one of their own."""
    if name == "whence.v1" or name.startswith("whence.v1."):
        return "whence.v1"
    return name.partition(".")[0] if name.partition(".")[0] in OURS else None


def allowed(importer: str, imported: str) -> bool:
    """Whether an arrow leads from one place to another; the SDK includes its stubs."""
    return (
        imported == importer
        or imported in ARROWS[importer]
        or (imported == "whence.v1" and "whence" in ARROWS[importer])
    )


def violations(path: Path, package: str) -> list[str]:
    found = []
    importer = place(package) or package
    for line, name in imports(path, package):
        imported = place(name)
        outside = imported == "whence" and path in RUN_OF_THE_DEMO
        if imported is not None and not outside and not allowed(importer, imported):
            found.append(f"{path.name}:{line}: {importer} imports {name}")
    return found


@pytest.mark.parametrize("package", OURS)
def test_imports_follow_the_arrows(package: str) -> None:
    files = list(modules(package))
    assert files
    assert [violation for path, within in files for violation in violations(path, within)] == []


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    """The check itself can fail: absolute, relative, aliased and hidden in a function."""
    wrong = tmp_path / "wrong.py"
    for package, source in [
        ("concepts", "import offline.craft as c"),
        ("concepts", "def f():\n    from service import app"),
        ("concepts.kinds", "import whence.v1.bank_pb2"),
        ("service", "from whence import Client"),
        ("service", "import whence"),
        ("offline", "from demo import world"),
        ("demo", "import whence"),
        ("demo", "from offline.trainers import craft"),
        ("whence", "import concepts"),
        ("whence.v1", "from .. import _client"),
        ("whence.v1", "import whence._client"),
    ]:
        wrong.write_text(source)
        assert violations(wrong, package), (package, source)
    for package, source in [
        ("service", "from whence.v1 import bank_pb2"),
        ("service", "import whence.v1.bank_pb2 as b"),
        ("whence", "from .v1 import bank_pb2"),
        ("whence", "from . import _client"),
        ("offline.metrics", "from concepts.cut import Cut\nfrom ..crops import x"),
    ]:
        wrong.write_text(source)
        assert not violations(wrong, package), (package, source)


def test_the_domain_knows_nothing_of_transport() -> None:
    for package in ("concepts", "offline", "demo"):
        for path, within in modules(package):
            roots = {name.partition(".")[0] for _, name in imports(path, within)}
            assert not roots & TRANSPORT, (path.name, roots & TRANSPORT)


def test_the_client_needs_nothing_heavy() -> None:
    for path, within in modules("whence"):
        roots = {name.partition(".")[0] for _, name in imports(path, within)}
        assert not roots & HEAVY, (path.name, roots & HEAVY)


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_whence_loads_neither_torch_nor_ray() -> None:
    code = "import sys, whence, whence.v1; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(ast.literal_eval(in_a_fresh_process(code)))
    assert "whence" in loaded
    assert not loaded & {"torch", "torchvision", "ray", "bcos", "concepts", "service", "offline", "demo"}


def test_importing_concepts_loads_no_transport_and_says_nothing() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path, _ in modules("concepts")
        if path.stem != "__init__"
    ]
    code = (
        "import importlib, sys, random\nbefore = random.getstate()\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert random.getstate() == before\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = set(ast.literal_eval(in_a_fresh_process(code)))
    assert not loaded & {"ray", "grpc", "offline", "service", "whence", "demo"}


def test_proto_holds_no_python() -> None:
    ours = [path for path in (ROOT / "proto").rglob("*.py") if "node_modules" not in path.parts]
    assert ours == []
    assert list((ROOT / "proto/whence/v1").glob("*.proto"))


def test_every_folder_of_tests_is_a_package_and_every_package_has_tests() -> None:
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert {"concepts", "offline", "service", "demo", "benchmarks", "clients"} <= {folder.name for folder in folders}


def test_every_package_of_ours_can_be_installed() -> None:
    for package in OURS:
        for path, _ in modules(package):
            assert (path.parent / "__init__.py").is_file(), path.parent
