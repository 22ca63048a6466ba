"""What users see of the package before they call anything."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import whence

PACKAGE = Path(whence.__file__).parent
HEAVY = ["torch", "ray", "matplotlib", "PIL", "typer", "rich", "pandas", "scipy"]


def modules_after(statement: str) -> set[str]:
    """Names of the top-level modules that a fresh process has loaded after a statement."""
    program = f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_loads_next_to_nothing() -> None:
    assert not modules_after("import whence") & {*HEAVY, "numpy", "grpc"}


@pytest.mark.parametrize("statement", ["from whence import *", "import whence.testing", "import whence.cli"])
def test_using_loads_nothing_heavy(statement: str) -> None:
    assert not modules_after(statement) & set(HEAVY)


def test_public_names() -> None:
    assert sorted(whence.__all__) == sorted(set(whence.__all__))
    assert set(whence.__all__) == {*whence._HOMES, "__version__"}
    assert set(dir(whence)) == set(whence.__all__)
    for name in whence._HOMES:
        assert getattr(whence, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        whence.nonsense  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        (alias.name, node.module) for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert declared == {(name, f"whence.{module}") for name, module in whence._HOMES.items()}
    assert (PACKAGE / "py.typed").exists()


def test_modules_are_private_but_two() -> None:
    public = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")}
    assert public == {"cli", "testing"}


def test_required_versions_are_not_older_than_the_stubs() -> None:
    requirements = dict(
        re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", line.split(";")[0].strip()).groups()  # type: ignore[union-attr]
        for line in importlib.metadata.requires("whence") or []
        if "extra ==" not in line
    )
    grpc_stub = (PACKAGE / "v1/explanation_service_pb2_grpc.py").read_text()
    message_stub = (PACKAGE / "v1/explanation_service_pb2.py").read_text()
    generated = {
        "grpcio": re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", grpc_stub),
        "protobuf": re.search(r"Protobuf Python Version: ([\d.]+)", message_stub),
    }
    for name, match in generated.items():
        assert match is not None
        assert tuple(map(int, requirements[name].split("."))) >= tuple(map(int, match[1].split(".")))


def test_version_is_that_of_the_distribution() -> None:
    assert whence.__version__ == importlib.metadata.version("whence")
