"""The images of a data set, decoded once and kept on the disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import data, presets
from ..config import Config, UserError, expect, option
from ..data import cache


@dataclass(frozen=True)
class Options:
    """decode a data set ahead of its first run, or check or delete what is decoded"""

    preset: str = option("paper", f"where the options start from: {', '.join(presets.found())}")
    config: Config = field(default_factory=presets.paper)
    verify: bool = option(False, "check every image that the cache holds, of all data sets")
    delete: bool = option(False, "delete what the cache holds, of all data sets")

    def run(self) -> None:
        expect(not (self.verify and self.delete), "delete", True, "one of --verify and --delete")
        with cache.kept_in(self.config.output.cache) as directory:
            if not directory:
                raise UserError("output.cache: got 'off', expected a folder")
        if self.verify:
            cache.verify(directory)
        elif self.delete:
            cache.delete(directory)
        else:
            expect(hasattr(self.config.data, "path"), "data", self.config.data.name, "a data set of files")
            with cache.must_keep():
                print(data.describe(data.prepare(self.config)))
        print(cache.listing(directory))
