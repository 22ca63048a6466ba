"""Explains a batch, and prints how fast that was and what memory it took: ``SOURCE ADDRESS BANK``."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import whence


def main(source: str, address: str, bank: str) -> None:
    """Explain everything at a source into a temporary folder."""
    with tempfile.TemporaryDirectory() as out:
        summary = whence.explain_batch(source, out, address=address, bank=bank)
    if summary.failed or not summary.complete:
        raise RuntimeError(f"not all were explained: {summary}")
    peak = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if peak is None:
        raise RuntimeError("this system does not tell VmHWM")
    print(json.dumps({"images_per_s": summary.explained / summary.seconds, "peak_mib": int(peak[1]) / 1024}))


if __name__ == "__main__":
    main(*sys.argv[1:])
