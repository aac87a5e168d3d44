"""The twin's transform as an index on its map, derived from what the reference does to a map.

Every transform is a symmetry of the square, so T(A~)[h, w] reads A~ in a row and a column that are each linear in h and
w, with coefficients that do not depend on the size of the map: six small integers are all a kernel needs to undo it, on
the load or on the tiny map. Where three corners go determines all six, so the operators take one number. A new
transform is one row of ``reference.TRANSFORMS``.
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

    @classmethod
    def of(cls, corners: int) -> TwinMap:
        """From the elements of a 2 x 2 map that are read for its elements [0, 0], [1, 0] and [0, 1]: three digits to
        base 4, as the operators take them.

        >>> TwinMap.of(16 * 1 + 4 * 3 + 0)  # hflip reads [0, 1], [1, 1] and [0, 0]
        TwinMap(row=0, row_h=1, row_w=0, column=1, column_h=0, column_w=-1)
        """
        start, down, right = corners // 16, corners // 4 % 4, corners % 4
        row, column = divmod(start, 2)
        return cls(row, down // 2 - row, right // 2 - row, column, down % 2 - column, right % 2 - column)

    def on(self, height: int, width: int) -> tuple[int, int, int]:
        """(offset, stride_h, stride_w) on such a map: T(A~)[h, w] = A~.flatten()[offset + h stride_h + w stride_w].

        >>> TwinMap.of(TWIN_MAPS["hflip"]).on(7, 7)  # T(A~)[h, w] = A~[h, 6 - w]
        (6, 7, -1)
        """
        offset = self.row * (height - 1) * width + self.column * (width - 1)
        return offset, self.row_h * width + self.column_h, self.row_w * width + self.column_w


def _corners(transform: str) -> int:
    """Read off a 2 x 2 map, whose only distances are 0 and 1."""
    undo = reference.TRANSFORMS[transform][1]
    (start, right), (down, _) = undo(torch.arange(4, device="cpu").reshape(2, 2)).tolist()
    return 16 * start + 4 * down + right


#: transform -> its map as the operators take it, see :meth:`TwinMap.of`.
TWIN_MAPS = {transform: _corners(transform) for transform in reference.TRANSFORMS}
NAMES = tuple(TWIN_MAPS)
#: Transforms that swap the axes, so that the map must be square.
SQUARE_ONLY = tuple(transform for transform, corners in TWIN_MAPS.items() if TwinMap.of(corners).row_w)
