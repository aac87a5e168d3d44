"""The twin's transform as an index on its map.

Every transform here is a symmetry of the square, so T(A~)[h, w] is the element
``offset + h * stride_h + w * stride_w`` of the flattened A~: three integers are all a kernel needs to undo it,
on the load or on the tiny map. A new transform is a row here and one in ``reference.TRANSFORMS``.
"""

from __future__ import annotations

from typing import NamedTuple


class TwinMap(NamedTuple):
    """T(A~)[h, w] = A~.flatten()[offset + h * stride_h + w * stride_w]."""

    offset: int
    stride_h: int
    stride_w: int


_TWIN_MAPS = {
    "identity": lambda h, w: TwinMap(0, w, 1),
    "hflip": lambda h, w: TwinMap(w - 1, w, -1),
    "vflip": lambda h, w: TwinMap((h - 1) * w, -w, 1),
    "rot90": lambda h, w: TwinMap((h - 1) * w, 1, -w),
    "rot180": lambda h, w: TwinMap(h * w - 1, -w, -1),
    "rot270": lambda h, w: TwinMap(h - 1, -1, w),
    "transpose": lambda h, w: TwinMap(0, 1, w),
}

NAMES = tuple(_TWIN_MAPS)
#: Transforms that swap the axes, so that the map must be square.
SQUARE_ONLY = ("rot90", "rot270", "transpose")


def twin_map(transform: str, height: int, width: int) -> TwinMap:
    """The index that undoes ``transform`` on a (height, width) map.

    >>> twin_map("hflip", 7, 7)  # T(A~)[h, w] = A~[h, 6 - w]
    TwinMap(offset=6, stride_h=7, stride_w=-1)
    """
    return _TWIN_MAPS[transform](height, width)
