"""Whether a process can still use its GPU."""

from __future__ import annotations

import sys

#: Exit status of a process that leaves because its GPU answers it no more.
POISONED = 17


def poisoned() -> str | None:
    """Why this process can use its GPU no more, or None.

    After a bad access every later CUDA call of the process fails, with the first one's error: whatever else it finds
    is worth nothing. An error that only its own call had does not come again when the device is waited for.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():  # it has not used any
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
