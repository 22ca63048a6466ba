"""Who checks types strictly is told the right ones, and of mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import whence

PROGRAM = Path(__file__).with_name("user_program.py")
INSTALLED = """
[mypy]
strict = true
mypy_path = {package}
[mypy-whence.*]
follow_imports = silent
ignore_errors = true
"""
"""As mypy treats packages that were installed: what they are is read, and not judged."""


def check(program: Path, folder: Path, version: str) -> subprocess.CompletedProcess[str]:
    settings = folder / "mypy.ini"
    settings.write_text(INSTALLED.format(package=Path(whence.__file__).parents[1]))
    command = [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", folder / "cache"]
    return subprocess.run(
        [*command, "--python-version", version, program], capture_output=True, text=True, check=False, cwd=folder
    )


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_a_strict_program_is_understood(version: str, tmp_path: Path) -> None:
    done = check(PROGRAM, tmp_path, version)
    assert done.returncode == 0, done.stdout


def test_the_program_would_notice(tmp_path: Path) -> None:
    """Each mistake is one, and a type that is not asked for is an error."""
    program = tmp_path / "program.py"
    text = PROGRAM.read_text()
    mistakes = text.count("# type: ignore")
    program.write_text(re.sub(r"  # type: ignore.*", "", text).replace("whence.Explanation | None", "str"))
    done = check(program, tmp_path, "3.11")
    assert mistakes >= 7
    assert f"Found {mistakes + 1} errors" in done.stdout
