"""A command that runs so long and no longer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Outcome(NamedTuple):
    status: int | None  #: exit status, negative for a signal; None when stopped at the limit
    output: str  #: stdout and stderr, in order
    seconds: float

    @property
    def failure(self) -> str | None:
        """What went wrong in a few words, or None.

        >>> Outcome(-11, "", 1.0).failure
        'died of SIGSEGV'
        """
        if self.status is None:
            return f"stopped after {self.seconds:.0f} s"
        if self.status < 0:
            return f"died of {signal.Signals(-self.status).name}"
        return f"exit status {self.status}" if self.status else None


def run(
    command: Sequence[str],
    seconds: float,
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    log: Path | None = None,
) -> Outcome:
    """Run ``command`` with ``environment`` added to ours; at the limit it is killed with all that it started.

    The output goes to the end of a file (``log``, kept, or a temporary one), so what was written before the end is
    there and a grandchild that holds the output open delays nothing.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        path = log or Path(temporary, "log")
        with path.open("ab") as file:
            begin = file.tell()
            process = subprocess.Popen(
                command, env={**os.environ, **(environment or {})}, cwd=directory, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status: int | None = process.wait(max(seconds, 0.0))
            except subprocess.TimeoutExpired:
                status = None
            finally:  # Ctrl-C too
                _kill_session(process.pid)
                process.wait()
        return Outcome(status, path.read_bytes()[begin:].decode(errors="replace"), time.monotonic() - start)


def _kill_session(session: int) -> None:
    """Kill what a session's leader started, the process groups in it too: ninja gives each compiler one of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the name, which may hold anything: state, parent, group, session.
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                os.kill(int(stat.parent.name), signal.SIGKILL)
