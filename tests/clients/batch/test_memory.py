"""Memory is the same for few images and for many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import resource, sys
from pathlib import Path
from tests.clients.batch.worlds import ANSWER, a_job, do
from whence._batch.sources import Content, Listed

class Endless:
    # Names and contents are made up as they are needed: what is measured is the batch, not the disk.
    place = a_job(sys.argv[1], sys.argv[2]).source

    def list(self):
        return (Listed(f"folder/{n:07d}.jpg", f'"{n}"', 1000) for n in range(int(sys.argv[3])))

    async def read(self, key):
        return Content(key.encode() * 60, '"x"')

async def explain(content, timeout_s):
    return ANSWER

summary = do(a_job(sys.argv[1], sys.argv[2], chunk_size=None), explain, source=Endless(), progress=lambda _: None)
assert summary.explained == int(sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_mb(tmp_path: Path, count: int) -> float:
    """Most memory that a process took to explain so many objects, in MB."""
    folders = [tmp_path / f"{name}{count}" for name in ("in", "out")]
    folders[0].mkdir()
    command = [sys.executable, "-c", PROGRAM, *map(str, folders), str(count)]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


def test_memory_is_constant_in_the_number_of_images(tmp_path: Path) -> None:
    few, many = (peak_mb(tmp_path, count) for count in (2_000, 40_000))
    assert many < few + 40
