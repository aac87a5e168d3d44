"""The images of a data set, decoded once and kept on the disk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

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
        if output.cache == cache.OFF:
            raise UserError("output.cache: got 'off', expected a folder")
        with cache.kept_in(output.cache) as directory:
            assert directory, "not off"
            if self.verify or self.delete:
                return self._verify(directory) if self.verify else self._delete(directory)
        if not hasattr(self.config.data, "path"):
            raise UserError(f"data: got {self.config.data.name}, which has no files; expected a data set of files")
        config = dataclasses.replace(self.config, output=dataclasses.replace(output, cache=str(directory)))
        with cache.must_keep():
            print(data.describe(data.prepare(config)))
        return self._list(directory)

    def _list(self, directory: Path) -> int:
        for folder in cache.parts(directory):
            images = f"{len(index):,} images" if (index := cache.load_index(folder)) else "unfinished"
            print(f"{folder}: {images}, {cache.size_of(folder) / 2**20:,.0f} MiB")
        return 0

    def _verify(self, directory: Path) -> int:
        bad = {folder: names for folder in cache.parts(directory) if (names := cache.damaged(folder))}
        for folder, names in bad.items():
            print(f"{folder}: {len(names)} damaged: {data.listed(names, 20)}")
        if bad:
            raise UserError(f"output.cache: got {len(bad)} damaged parts; delete their folders, runs decode them again")
        return self._list(directory)

    def _delete(self, directory: Path) -> int:
        for folder in cache.parts(directory):
            cache.delete(folder)
            print(f"deleted {folder}")
        return 0
