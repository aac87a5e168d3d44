"""What a worker says of its items, on a pipe that its launcher reads."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

#: Names the pipe.
PIPE = "BENCH_WORKER_PIPE"
#: Kept of what is said of an item, characters.
LONGEST = 6000


class Report(NamedTuple):
    item: str
    state: str  #: "begun", then "passed", "failed" or "skipped"; "lost" and "not run" are the launcher's words
    text: str = ""  #: the reason in its first line


def say(item: str, state: str, text: str = "") -> None:
    """Report, if there is a launcher."""
    if PIPE in os.environ:
        os.write(int(os.environ[PIPE]), json.dumps([item, state, text[:LONGEST]]).encode() + b"\n")
