"""The images of a data set, decoded once and kept on the disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import data, presets
from ..config import Config, UserError, option
from ..data import cache


@dataclass(frozen=True)
class Options:
    """decode a data set ahead of its first run, or check or delete what is decoded"""

    preset: str = option("paper", f"where the options start from: {', '.join(presets.found())}")
    config: Config = field(default_factory=presets.paper)
    verify: bool = option(False, "check every image that the cache holds, of all data sets")
    delete: bool = option(False, "delete what the cache holds, of all data sets")

    def run(self) -> int:
        output = self.config.output
        with cache.kept_in(output.cache) as directory:
            if not directory:
                raise UserError("output.cache: got 'off', expected a folder")
        if self.verify:
            cache.verify(directory)
        elif self.delete:
            cache.delete(directory)
        elif not hasattr(self.config.data, "path"):
            raise UserError(f"data: got {self.config.data.name}, which has no files; expected a data set of files")
        else:
            with cache.must_keep():
                print(data.describe(data.prepare(self.config)))
        print(cache.listing(directory))
        return 0
