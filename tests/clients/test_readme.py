"""What the README and the docstrings show does run."""

from __future__ import annotations

import doctest
import re
import shutil
from pathlib import Path

import pytest

import whence
import whence.testing
from tests.data import real_data
from whence.testing import FakeServer

README = (Path(whence.__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(
    snippet: str,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(real_data() / "photos" / "n02115641_dingo.JPEG", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    assert '"localhost:9000"' in snippet
    exec(snippet.replace("localhost:9000", server.address), {"whence": whence})
    assert "tabby" in capsys.readouterr().out
    assert (tmp_path / "why.png").exists() == ("save" in snippet)


def test_there_is_a_first_snippet_of_ten_lines() -> None:
    assert SNIPPETS
    assert len([line for line in SNIPPETS[0].splitlines() if line.strip()]) <= 10


def test_docstrings_run() -> None:
    outcome = doctest.testmod(whence.testing)
    assert outcome.attempted >= 3
    assert outcome.failed == 0
