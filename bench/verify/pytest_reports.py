"""A plugin of pytest that makes it a worker: it says when each test begins and, at once, how it ended."""

from __future__ import annotations

import os

import pytest

from .device import POISONED, poisoned
from .reports import say

_ended: dict[str, tuple[str, str]] = {}  #: state and text of the test that runs


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        for item in session.items:
            say(item.nodeid, "collected")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        say(report.nodeid, "failed", report.longreprtext)


def pytest_runtest_logstart(nodeid: str) -> None:
    _ended.clear()
    say(nodeid, "begun")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of setup, call and teardown the first that did not pass decides."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        shown = [crash.message if crash else "", report.longreprtext, (report.capstdout + report.capstderr)[-1000:]]
        _ended.setdefault(report.nodeid, ("failed", "\n".join(filter(None, shown))))
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        _ended.setdefault(report.nodeid, ("skipped", reason))


def pytest_runtest_logfinish(nodeid: str) -> None:
    state, text = _ended.get(nodeid, ("passed", ""))
    if bad := poisoned():
        state, text = "failed", f"{text}\nit leaves the device unusable: {bad}".lstrip()
    say(nodeid, state, text)
    if bad:
        os._exit(POISONED)
