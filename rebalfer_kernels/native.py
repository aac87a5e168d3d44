"""Loading of the native backends; there are none in this version."""

from __future__ import annotations


def load(part: str) -> tuple[bool, str]:
    """Whether the native part ("cpu" or "cuda") is loaded, and "available" or the reason why not."""
    return False, f"the native {part} kernels are not part of this version"
