"""A clock that counts instead of measuring, and rows of a made-up GPU."""

import itertools

from bench.clocks import Launch, WallClock


class FakeClock(WallClock):
    """Counts: an interval lasts 1 ms, and 1 ms more for each mark, 2 for each captured call."""

    def __init__(self):
        self.waits = 0
        self.replayed = 0

    def wait(self):
        self.waits += 1

    def intervals_ms(self, run):
        self.replayed = 0
        marks = itertools.count(1)
        times = []
        run(lambda: times.append(1.0 * next(marks)))
        return (*times, 1.0 + len(times) + self.replayed)

    def release(self):
        pass

    def capture(self, run, repetitions):
        def replay():
            run()
            self.replayed += 2 * repetitions

        return replay

    def launches(self, run):
        run()
        return [Launch("forward kernel", 3.0), Launch("backward kernel", 5.0)]

    def peak_bytes(self, run):
        run()
        return 1234


PAPER, LARGE, OTHER = "N32-C512-nchw-bfloat16", "N512-C2048-nchw-bfloat16", "N64-C2048-nchw-bfloat16"


def rows(case, group="", share=0.95, launches=2, **us):
    """A row for each contender, by its microseconds."""
    names = {"plain": "plain eager, compiled", "best": "best eager, compiled"}
    return [
        {
            "case": case, "group": group, "contender": names.get(name, name), "both": [0.0, t / 1e3, 0.0],
            "share_of_copy": share, "launches": launches, "gb_per_s": 4000.0, "host_ms": 0.05,
            "peak_extra_bytes": 3_500_000, "eager": {"both": [0.0, 0.07, 0.0]},
        }
        for name, t in us.items()
    ]  # fmt: skip


GPU_ROWS = [
    *rows(PAPER, "paper's batch", share=0.3, ours=10.0, identity=12.0, plain=40.0, best=29.0, released=260.0),
    *rows(LARGE, "large and wide", share=0.91, ours=110.0, identity=99.0, plain=320.0, best=176.0, released=4000.0),
    *rows(OTHER, "", share=0.1, launches=9, ours=20.0, identity=1.0, plain=60.0, best=1.0, released=400.0),
    *rows(PAPER.replace("bfloat16", "float32"), "paper's batch", launches=7, ours=1.0, identity=1.0),
]
