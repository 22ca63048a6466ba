"""Run every benchmark, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SHARED = {"__init__", "__main__", "batch_client", "bucket", "canned", "measure", "resnet50", "served"}


def main() -> None:
    """Run them one after another; stop at the first that fails."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in SHARED:
            print(f"{path.stem} …", flush=True)
            subprocess.run([sys.executable, "-m", f"benchmarks.{path.stem}"], check=True)


if __name__ == "__main__":
    main()
