"""Makes `Client` out of `AsyncClient`: the same text without its waiting words. ``--check`` only compares."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGE = Path(__file__).parent / "whence"
GENERATED = {"_async_client.py": "_client.py", "_async_stream.py": "_stream.py"}

WORDS = {
    r"\basync (?=def|for|with)": "",
    r"\bawait ": "",
    r"\bAsync(?=Client|Stream|Iterable)": "",
    r"\bAsyncGenerator\[(\w+), None\]": r"Generator[\1, None, None]",
    r"\bAsyncGenerator\b": "Generator",
    r"\bAwaitable\[(\w+|_io\.Exchange)\](?=[,\]\n])": r"\1",
    r"\b_async_(?=client|io|stream)": "_sync_",
    r"_sync_(?=client|stream)": "_",
    r"\b__a(?=enter__|exit__)": "__",
    r"\banext\b": "next",
    r"\baclosing\b": "closing",
    # What this leaves twice.
    r"\b(\w+\[\w+\]) \| \1": r"\1",
    r"\b(Iterable), (.*)\1, ": r"\1, \2",
    r", Awaitable\b": "",
}
PHRASES = {
    "A connection to a Whence service, for one event loop; safe to share between its tasks, made once and kept.\n"
    "\n    It may be made before the loop runs. A task that is cancelled cancels its call.\n": (
        "A connection to a Whence service; safe to share between threads, and to be made once and kept.\n"
    ),
    "A callable, which may be asynchronous, is asked before": "A callable is asked before",
    "in the caller's task,": "in the caller's thread,",
    "(``contextlib.aclosing``)": "(``contextlib.closing``)",
    " An iterable that waits, for a disk or a network, should be an\n"
    "            asynchronous one: an outcome": " An outcome",
}


def synchronous(text: str) -> str:
    """The same module for threads."""
    for phrase, ours in PHRASES.items():
        text = text.replace(phrase, ours)
    for pattern, ours in WORDS.items():
        text = re.sub(pattern, ours, text)
    return text


def formatted(text: str) -> str:
    """As ruff would have it."""
    ruff = Path(sysconfig.get_path("scripts")) / "ruff"
    for command in (["check", "--select", "I,UP028", "--fix", "--unsafe-fixes", "--quiet"], ["format"]):
        done = subprocess.run(  # noqa: S603
            [ruff, *command, "--stdin-filename", PACKAGE / "_client.py", "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        )
        text = done.stdout
    return text


def main(check: bool) -> int:
    """Write the modules, or say which are not what they should be."""
    sources = {name: (PACKAGE / name).read_text() for name in GENERATED}
    idle = [phrase for phrase in PHRASES if not any(phrase in text for text in sources.values())]
    if idle:
        print(f"These phrases are in no module: {idle}", file=sys.stderr)  # noqa: T201
        return 1
    status = 0
    for name, target in GENERATED.items():
        head, _, rest = formatted(synchronous(sources[name])).partition("\n")
        text = f"{head}\n# Made from {name} by `make sync-client`: change that.\n{rest}"
        if not check:
            (PACKAGE / target).write_text(text)
        elif (PACKAGE / target).read_text() != text:
            print(f"{target} is not what {name} makes: run make sync-client.", file=sys.stderr)  # noqa: T201
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
