"""Rules for the whole suite."""

from __future__ import annotations

import os
import signal

import pytest


def pytest_configure() -> None:
    """Let interrupts through, to what the tests start, too: what runs in a shell's background ignores them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test fails the run, except those that need a GPU."""
    if os.environ.get("CI", "").lower() not in ("1", "true"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = (
        [r for r in reporter.stats.get("skipped", []) if "gpu" not in getattr(r, "keywords", ())] if reporter else []
    )
    if skipped:
        reporter.write_line(f"\nskipped in CI, which fails it: {', '.join(r.nodeid for r in skipped)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
