"""The twin's transform as an index on its map, derived from what the reference does to a map.

Every transform is a symmetry of the square, so T(A~)[h, w] reads A~ in a row and a column that are each linear in h and
w, with coefficients that do not depend on the size of the map: six small integers are all a kernel needs to undo it, on
the load or on the tiny map. A new transform is one row of ``reference.TRANSFORMS``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import reference


class TwinMap(NamedTuple):
    """T(A~)[h, w] = A~[row (H - 1) + row_h h + row_w w, column (W - 1) + column_h h + column_w w]."""

    row: int
    row_h: int
    row_w: int
    column: int
    column_h: int
    column_w: int

    def on(self, height: int, width: int) -> tuple[int, int, int]:
        """(offset, stride_h, stride_w) on such a map: T(A~)[h, w] = A~.flatten()[offset + h stride_h + w stride_w].

        >>> TWIN_MAPS["hflip"].on(7, 7)  # T(A~)[h, w] = A~[h, 6 - w]
        (6, 7, -1)
        """
        offset = self.row * (height - 1) * width + self.column * (width - 1)
        return offset, self.row_h * width + self.column_h, self.row_w * width + self.column_w


def _twin_map(transform: str) -> TwinMap:
    """Read off a 2 x 2 map, whose only distances are 0 and 1."""
    undo = reference.TRANSFORMS[transform][1]
    (start, right), (down, _) = undo(torch.arange(4, device="cpu").reshape(2, 2)).tolist()
    coefficients = []
    for at, at_down, at_right in ((start // 2, down // 2, right // 2), (start % 2, down % 2, right % 2)):
        coefficients += [at, at_down - at, at_right - at]
    return TwinMap(*coefficients)


TWIN_MAPS = {transform: _twin_map(transform) for transform in reference.TRANSFORMS}
NAMES = tuple(TWIN_MAPS)
#: Transforms that swap the axes, so that the map must be square.
SQUARE_ONLY = tuple(transform for transform, twin_map in TWIN_MAPS.items() if twin_map.row_w)
