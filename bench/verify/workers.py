"""Items checked in worker processes, so that one that crashes, hangs or ruins its device costs nothing but itself.

A worker is given items and says of each when it begins and how it ended (reports.py). When its process ends early,
the item that it had begun is lost, and a new process continues with the next one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence

from rebalfer_kernels.doctor.bounded import Outcome

from .reports import PIPE, Report

#: Kept of what a process printed before it died, characters: a Python traceback of a crash has its cause on top.
TAIL = 8000


class Worker:
    """A worker's process; iterated over, its reports, until it has ended or said nothing for ``patience`` seconds."""

    def __init__(self, command: Sequence[str], patience: float, end: float) -> None:
        self.command, self.patience, self.end = command, patience, end
        self.ended = ""  #: why, in a few words, and the last it printed

    def __iter__(self) -> Iterator[Report]:
        read, write = os.pipe()
        with tempfile.TemporaryFile() as printed, io.FileIO(read) as pipe:
            process = subprocess.Popen(
                self.command,
                env={**os.environ, PIPE: str(write)},
                pass_fds=(write,),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                process_group=0,  # its own to be killed by, in the session of the launcher, which may be killed too
            )
            os.close(write)
            try:
                silent = yield from self._reports(pipe)
                if not silent:  # it closed the pipe, so it is about to end
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(10)
                self.ended = silent or Outcome(process.poll(), "", 10.0).failure or "ended"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it back
                    process.wait(10)
                printed.seek(0)
                last = printed.read()[-TAIL:].decode(errors="replace").strip()
                self.ended += f"\n{last}" if last else ""

    def _reports(self, pipe: io.FileIO) -> Generator[Report, None, str]:
        """Until the pipe is closed; returns why it was not waited for any longer, if so."""
        unread = b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                left = self.end - time.monotonic()
                if left <= 0:
                    return "stopped, the time is up"
                if not selector.select(min(self.patience, left)):
                    if left > self.patience:
                        return f"hangs: stopped after {self.patience:g} s"
                    continue
                if not (some := pipe.read(2**16)):
                    return ""
                *lines, unread = (unread + some).split(b"\n")
                for line in lines:
                    yield Report(*json.loads(line))


def run(
    command: Callable[[list[str]], list[str]], items: Sequence[str], processes: int, patience: float, end: float
) -> Iterator[Report]:
    """How each item ended, as it comes, from workers that ``command`` starts with some of the items each.

    ``patience`` is the longest that one item, or the start of a worker, may take, in seconds; at ``end`` on the
    monotonic clock all is stopped, and what was not begun is "not run".
    """
    reports: list[Report] = []
    news = threading.Condition()

    def put(report: Report) -> None:
        with news:
            reports.append(report)
            news.notify()

    shares = [list(items[i::processes]) for i in range(min(processes, len(items)))]
    threads = [
        threading.Thread(target=_work, args=(command, share, patience, end, put), daemon=True) for share in shares
    ]
    for thread in threads:
        thread.start()
    for i in range(len(items)):
        with news:
            while len(reports) <= i:
                news.wait()
            report = reports[i]
        yield report


def _work(
    command: Callable[[list[str]], list[str]],
    left: list[str],
    patience: float,
    end: float,
    put: Callable[[Report], None],
) -> None:
    """Check the items one after the other, in a new process after each that ends early."""
    while left and time.monotonic() < end:
        before, begun = len(left), None
        worker = Worker(command(left), patience, end)
        try:
            for report in worker:
                begun = report.item
                if report.state != "begun" and report.item in left:
                    left.remove(report.item)
                    put(report)
        except (OSError, ValueError) as error:  # it cannot be started, or what it says is not understood
            worker.ended = f"{type(error).__name__}: {error}"
        if begun in left:
            left.remove(begun)
            put(Report(begun, "lost", worker.ended))
        elif len(left) == before:  # and so would the next process
            put(Report(left.pop(0), "lost", f"its process began nothing: {worker.ended}"))
            break
    for item in left:
        put(Report(item, "not run"))


def main(reports: Iterator[Report]) -> int:
    """Print each report as it comes, then the counts; the exit status, 0 if some passed and the others were skipped."""
    counts: Counter[str] = Counter()
    bad = []
    for report in reports:
        counts[report.state] += 1
        if report.state in ("failed", "lost"):
            bad.append(report)
        if report.state != "not run":
            print(f"{report.state} {report.item}" + (f": {report.text}" if report.text else ""), flush=True)
    for report in bad[:10]:
        print(f"{report.state} {report.item}: {report.text.partition(chr(10))[0]}"[:300])
    print(f"{counts.total()} items: " + ", ".join(f"{n} {state}" for state, n in counts.most_common()), flush=True)
    return 0 if counts["passed"] and not counts.keys() - {"passed", "skipped"} else 1
