"""Run a command under a time limit and kill everything it started."""

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

#: The longest that the end of a killed process is waited for.
KILLED_S = 10.0


class Outcome(NamedTuple):
    status: int | None  #: exit status, negative for a signal; None if stopped at the limit
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
    """Run ``command`` in ``directory`` for at most ``seconds``, then kill it and all that it started.

    ``environment`` is added to this process's. The output is appended to a file (``log``, which is kept, or a
    temporary one): what was written before the end is never lost, and a grandchild that keeps the output open does not
    delay the return.

    Raises:
        OSError: the command cannot be started.

    >>> run(["sh", "-c", "echo begun; sleep 60"], 0.5)[:2]
    (None, 'begun\\n')
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        path = log or Path(temporary, "log")
        with path.open("ab") as file:
            begin = file.tell()
            process = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(max(seconds, 0.0))
            except subprocess.TimeoutExpired:
                status = None
            finally:  # also after Ctrl-C
                _kill_session(process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold a killed process back
                    process.wait(KILLED_S)
        return Outcome(status, path.read_bytes()[begin:].decode(errors="replace"), time.monotonic() - start)


def _kill_session(session: int) -> None:
    """Kill a session's leader and all its process groups: ninja puts each compiler into a group of its own.

    Returns when all of them have ended, those included that were started meanwhile, or after KILLED_S.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
    deadline = time.monotonic() + KILLED_S
    while (running := _running(session)) and time.monotonic() < deadline:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def _running(session: int) -> list[int]:
    """The processes of a session that have not ended (Linux; elsewhere none)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The fields after the name, which may contain anything: state, parent, group, session.
            state, _, _, member_of = stat.read_text().rpartition(")")[2].split()[:4]
            if int(member_of) == session and state not in "ZX":
                found.append(int(stat.parent.name))
    return found
