"""What the benchmark's report says: the blocks of its document, from the newest result files."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

from rebalfer_kernels.backend import BACKENDS

from . import budget, goals, memory, model, pictures, results, texts
from .cases import Case
from .document import Block, Figures, Heading, Picture, Table

Result = dict[str, Any]

TRAINED = "a training loop's"  #: in place of the kind of memory, which differs with the size

CONTENDERS = ("identity", goals.PLAIN, goals.BEST, goals.RELEASED)
PHASES = ("forward", "backward", "both")
#: Which have a column only where they were measured.
MORE_CONTENDERS = ("plain eager, max-autotune", "best eager, max-autotune", "gradient in forward", "torch-cam")


class Found(NamedTuple):
    """The newest results of each kind."""

    cpus: list[Result]
    gpus: list[Result]
    steps: list[Result]
    regimes: list[Result]  #: which kind of memory a training loop sees
    studies: dict[str, list[dict[str, Any]]]  #: the runs of a study, by its name
    more: list[Result]  #: of the loss at more sizes, and of other operations
    modelled: list[tuple[model.Measured, float]]  #: kernels that a GPU has measured, and the µs that the model says
    methods: Sequence[Result] = ()  #: a step of every method

    @property
    def ordered(self) -> list[Result]:
        """Of a CPU: what a training loop sees, then the other kind of memory."""
        return sorted(self.cpus, key=lambda cpu: cpu["memory"] != self.seen)

    @property
    def operators(self) -> list[Result]:
        """Of the loss by itself, wherever it was measured."""
        return [*self.gpus, *self.ordered]

    @property
    def seen(self) -> str | None:
        """The kind of memory that training loops on a CPU see, if all that were looked at agree."""
        seen = {regime["seen"] for regime in self.regimes}
        return seen.pop() if len(seen) == 1 else None

    @property
    def headline(self) -> list[Result]:
        """What a reader should see first: on a CPU, each case with the memory that a training loop has, if known."""
        if self.seen is None:
            return self.operators
        machines: dict[tuple[str, str], list[Result]] = {}
        for cpu in self.cpus:
            machines.setdefault((cpu["device"], results.capability(cpu)), []).append(cpu)
        return [*self.gpus, *(as_trained(own, self.seen) for own in machines.values())]


def as_trained(cpus: Sequence[Result], seen: str) -> Result:
    """A CPU's results under one instruction set as one: rows whose memory a training loop has that sees ``seen``."""
    own = sorted(cpus, key=lambda cpu: cpu["memory"] == seen)
    rows = [row for cpu in own for row in cpu["rows"] if cpu["memory"] == memory.of(Case.named(row["case"]), seen)]
    return {**own[-1], "rows": rows, "memory": TRAINED}


def found() -> Found:
    return Found(
        cpus=results.newest_cpu(),
        gpus=results.newest_gpu(),
        steps=results.newest_by_backbone("step"),
        regimes=results.newest_by_backbone("memory"),
        studies=results.studies(),
        more=results.newest_more(),
        modelled=_modelled(),
        methods=results.newest_by_backbone("methods"),
    )


def _modelled() -> list[tuple[model.Measured, float]]:
    """By the model of those CUDA kernels that were measured, which may have changed since."""
    known = model.counted()["launches"]
    measured = [row for row in model.measured() if not row.launch.startswith("triton")]
    return [(row, model.of_measured(row, known[row.commit][row.launch])) for row in measured]


def _last_commit(modelled: list[tuple[model.Measured, float]]) -> list[tuple[str, float, float]]:
    """Launch, measured and modelled µs of the kernels that were measured last."""
    last = modelled[-1][0].commit if modelled else ""
    return [(row.launch, row.us, said) for row, said in modelled if row.commit == last]


def drawn(found: Found) -> dict[str, Any]:
    """The figures that there are numbers for, by the names of their files."""
    figures = {
        "speed-ups.png": pictures.speed_ups(found.operators),
        "roofline.png": pictures.roofline(found.operators),
        "scaling.png": pictures.scaling([*found.more, *found.headline]),
        "memory.png": pictures.memory(found.ordered),
        "model.png": pictures.model(_last_commit(found.modelled)),
        "step.png": pictures.step(found.steps),
    }
    return {name: figure for name, figure in figures.items() if figure}


def blocks(found: Found, shown: Container[str]) -> list[Block]:
    """The whole document, with those pictures that are ``shown``."""

    def picture(name: str) -> list[Block]:
        return [Picture(name, texts.CAPTIONS[name])] if name in shown else []

    return [
        Heading(1, "Benchmark"),
        *texts.INTRODUCTION,
        *_in_short(found),
        *picture("speed-ups.png"),
        Heading(2, "Goals"),
        *_goals(found),
        Heading(2, "From overhead to bandwidth"),
        *picture("roofline.png"),
        *picture("scaling.png"),
        *([] if pictures.every_axis([*found.more, *found.headline]) else [texts.NO_CURVES]),
        Heading(2, "Memory and bytes"),
        *picture("memory.png"),
        *_regime(found),
        Heading(2, "On a CPU"),
        *([texts.ON_A_CPU, texts.EVERY_FIGURE] if found.cpus else [texts.NO_CPU]),
        *_each(_cpu_section, found.ordered),
        Heading(2, "On a GPU"),
        *([texts.ON_A_GPU] if found.gpus else [texts.NO_GPU]),
        *_each(_gpu_section, found.gpus),
        *([Heading(2, "Other sizes and operations"), texts.MORE] if found.more else []),
        *_each(_more_section, found.more),
        *_model(found.modelled, picture("model.png")),
        Heading(2, "A whole training step"),
        *([texts.STEP, *picture("step.png"), *_steps(found.steps)] if found.steps else [texts.NO_STEP]),
        *_each(_method_section, found.methods),
        *_studies(found.studies),
        Heading(2, "Repeat it"),
        *texts.REPEAT,
    ]


def _each(section: Callable[[Result], list[Block]], found: Sequence[Result]) -> list[Block]:
    return [block for result in found for block in section(result)]


def _in_short(found: Found) -> list[Block]:
    boxes = []
    for result in found.headline:
        dtype = goals.judged_dtype(result)
        for name, spoken in texts.SPOKEN.items():
            how = "" if result["kind"] == "cpu" else f", in CUDA graphs, {_measured(result, name)}"
            boxes.append((speed(result, name), f"as fast as {spoken} ({pictures.where(result)}, {dtype}{how})"))
    boxes += _whole_steps(found.steps)
    judged = _all_goals(found)
    met = sum(goal["met"] for _, goal in judged)
    boxes.append((f"{met} of {len(judged)}", "goals are met, by the table below"))
    return [
        Figures(boxes),
        *_each(_earlier, found.gpus),
        "A case is one size of the head's input: N images and their N twins, C channels, the memory layout and the "
        "dtype, all with 7 × 7 maps and 7 classes unless its name says otherwise. **Plain eager** is the loss as "
        "people write it in PyTorch, **best eager** the same loss with the features multiplied only once, **compiled** "
        "means under `torch.compile`, **released** is the formulation of the programs published with the papers, and "
        "the **identity op** sums the features and writes a constant gradient: the same reads and writes, no "
        "computation.",
        "Every contender's loss and gradients were first shown to equal float64 within the rounding of the dtype: one "
        "that is wrong has no row. Times are medians of interleaved rounds, forward and backward with a fresh "
        "gradient.",
    ]


def _measured(result: Result, contender: str) -> str:
    """Of how many cases a range of speed-ups is.

    >>> rows = [{"case": f"N{n}-C64-nchw-bfloat16", "contender": n, "both": [1, 1, 1]} for n in ("ours", "released")]
    >>> _measured({"kind": "cuda", "rows": rows, "left_out": ["N9-C64-nchw-bfloat16"]}, "released")
    '0 of 3 cases'
    """
    figures = goals.of(goals.judged_dtype(result), goals.speed_up(contender))(result).values()
    return f"{sum(figure is not None for figure in figures)} of {len(figures)} cases"


def _whole_steps(steps: Sequence[Result]) -> list[tuple[str, str]]:
    """How much faster a whole step is, and of what the head is how much."""
    boxes = []
    for kind in dict.fromkeys(step["kind"] for step in steps):
        own = [step for step in steps if step["kind"] == kind]
        shares = [100 * step["parts_ms"]["head"] / sum(step["parts_ms"].values()) for step in own]
        head = f"; the head is {_range(shares, '{:.1f}')} % of it"
        where = f"({', '.join(step['config']['backbone']['name'] for step in own)}, {pictures.where(own[0])})"
        for authors, other, more in ((False, "with other heads", head), (True, "as the authors take it", "")):
            ratios, alike = [], []  # alike: backbones where the middle halves of the samples overlap
            for step in own:
                rows = {row["contender"]: row["ms"] for row in step["rows"]}
                others = [ms for name, ms in rows.items() if name != "ours" and (name == goals.AUTHORS) == authors]
                ratios += [ms[1] / rows["ours"][1] for ms in others]
                if any(ms[0] <= rows["ours"][2] for ms in others):
                    alike.append(step["config"]["backbone"]["name"])
            if ratios:
                text = f"as fast as a whole training step {other} {where}{_within(alike)}{more}"
                boxes.append((_range(ratios, "{:.2f}") + "×", text))
    return boxes


def _within(backbones: Sequence[str]) -> str:
    names = " and ".join(backbones)
    return f", within the spread of the samples for {names}" if names else ""


def _range(figures: Sequence[float], style: str) -> str:
    """
    >>> _range([1.013, 1.004, 1.02], "{:.2f}"), _range([1.0], "{:.1f}")
    ('1.00–1.02', '1.0')
    """
    low, high = style.format(min(figures)), style.format(max(figures))
    return low if low == high else f"{low}–{high}"


def speed(result: Result, contender: str) -> str:
    """The range of our speed-ups over the cases of the dtype that the goals judge."""
    of_all = goals.of(goals.judged_dtype(result), goals.speed_up(contender))(result).values()
    known = [figure for figure in of_all if figure is not None]
    if not known:
        return "(not measured)"
    low, high = (f"{f:.1f}" if f < 9.95 else f"{f:.0f}" for f in (min(known), max(known)))
    return f"{low}×" if low == high else f"{low}–{high}×"


def _all_goals(found: Found) -> list[tuple[str, dict[str, Any]]]:
    """Every goal, where it was judged; where nothing was measured, once."""
    judged: list[tuple[str, dict[str, Any]]] = []
    seen: set[goals.Goal] = set()
    for program, measured in (("op", [*found.ordered, *found.gpus]), ("step", found.steps)):
        for result in measured:
            where = pictures.where(result)
            if program == "step":
                where = f"{result['config']['backbone']['name']}, {where}"
            applying = goals.applying(program, result)
            judged += [(where, goal.judge(result)) for goal in applying]
            seen.update(applying)
    devices = {
        "cuda": "a GPU",
        "cpu": "a CPU",
        "cpu fresh": "a CPU, fresh memory",
        "cpu reused": "a CPU, reused memory",
    }
    nothing: Result = {"rows": [], "bfloat16_over_float32": {}}
    judged += [(devices[goal.device], goal.judge(nothing)) for goal in goals.GOALS if goal not in seen]
    return judged + [("counted without a GPU", goal) for goal in _budget()]


def _budget() -> list[dict[str, Any]]:
    """What the compiled GPU kernels issue, as goals."""
    rows = [row for row in budget.rows(json.loads(budget.GOLDEN.read_text())) if row.judged]
    worst = min(row.bytes_per_instruction for row in rows)
    return [
        {
            "goal": "bytes of features per warp instruction, forward and backward", "sense": "at least",
            "bound": bound, "unit": "", "met": worst >= bound,
            "cases": {row.name: row.bytes_per_instruction for row in rows},
        }
        for bound in (budget.BYTES, budget.BETTER)
    ]  # fmt: skip


def _goals(found: Found) -> list[Block]:
    judged = [(goal["goal"], *_verdict(goal), where) for where, goal in _all_goals(found)]
    verdicts = [verdict.strip("*") for _, verdict, *_ in judged]
    total = ", ".join(f"{verdicts.count(v)} {v}" for v in ("met", "not met", "open") if v in verdicts)
    return [
        f"Judged by the worst case: {total}. A goal is open where nothing was measured, or only some of its cases and "
        "all of these meet it.",
        Table(["goal", "verdict", "worst case", "bound", "where"], [list(line) for line in judged]),
    ]


def _verdict(goal: dict[str, Any]) -> tuple[str, str, str]:
    """Of a judged goal: the verdict, the worst figure with the cases that it is of, and its bound."""
    known = [figure for figure in goal["cases"].values() if figure is not None]
    bound, figure, verdict = f"{goal['sense']} {goal['bound']:g}{goal['unit']}", "-", "open"
    if known:
        worst = max(known) if goal["sense"] == "at most" else min(known)
        figure = f"{worst:.2f}{goal['unit']}"
        beyond = worst > goal["bound"] if goal["sense"] == "at most" else worst < goal["bound"]
        verdict = "**not met**" if beyond else "open"
        if len(known) < len(goal["cases"]):
            figure += f" ({len(known)} of {len(goal['cases'])} cases)"
    return "met" if goal["met"] else verdict, figure, bound


def _regime(found: Found) -> list[Block]:
    text = [texts.MEMORY_ON_A_CPU]
    for regime in found.regimes:
        config, faults = regime["config"], regime["faults"]
        text.append(
            f"Found by training {config['backbone']['name']} at {config['image_size']} pixels in batches of "
            f"{config['batch_size']} ({regime['device']}, {_origin(regime)}): in a step, the head touches "
            f"{faults['none']:,} pages for the first time; with malloc set to fresh memory {faults['fresh']:,}, to "
            f"reused memory {faults['reused']:,}. So this training loop sees **{regime['seen']} memory**."
        )
    return list(text)


def _cpu_section(result: Result) -> list[Block]:
    where = (
        f"{result['device']} ({results.capability(result)}), {result['threads']} threads, torch {result['torch']}, "
        f"{_origin(result)}, {_copy(result)}.{_far_caches(result)}"
    )
    kind, _, meaning = texts.MEMORY[result["memory"]].partition(": ")
    title = f"{kind}: {result['device']} ({results.capability(result)}){pictures.earlier(result)}"
    text = f"{meaning[0].upper()}{meaning[1:]}. {where}"
    return [Heading(3, title), text, _times(result, 1.0), _every_figure(result)]


def _far_caches(result: Result) -> str:
    """In how many rounds the threads' cores shared no cache; nothing of a result that is older than that.

    >>> rows = [{"case": "N1-C16-nchw-float32", "far_caches": 0.254}, {"case": "N2-C16-nchw-float32", "far_caches": 0}]
    >>> _far_caches({"rows": rows})
    ' The threads ran on cores with no L3 cache in common in 0–25 % of the rounds of a case.'
    """
    shares = [100 * row["far_caches"] for row in result["rows"] if "far_caches" in row]
    if not shares:
        return ""
    return (
        f" The threads ran on cores with no L3 cache in common in {_range(shares, '{:.0f}')} % of the rounds of a case."
    )


def _earlier(result: Result) -> list[Block]:
    """Which of the kernels that a GPU has timed are others now."""
    commits = result.get("commits", {})
    changed = {
        "CUDA": model.changed_since(commits.get("cuda", result["commit"])),
        "Triton": model.triton_changed_since(commits.get("triton", result["commit"])),
    }
    return [
        f"{backend}'s {' and '.join(kernels)} {'kernel was' if len(kernels) == 1 else 'kernels were'} rewritten after "
        f"the {result['device']} had run: every figure of {backend}, and of ours where {backend} serves, is of earlier "
        "code. [What a GPU has run since](../bench/results/gpu/README.md), and [what a model says](gpu-model.md)."
        for backend, kernels in changed.items()
        if kernels
    ]


def _gpu_section(result: Result) -> list[Block]:
    where = (
        f"Driver {result['driver']}, CUDA {result['cuda']}, torch {result['torch']}, Triton {result['triton']}, "
        f"{_origin(result)}, {_copy(result)}."
    )
    names, measured = result["left_out"], len(goals.by_case(result))
    summary = f"Left out for want of time: {len(names)} of {len(names) + measured} cases"
    left_out = [Table(["case"], [[name] for name in names], folded=summary)] if names else []
    disturbed = [
        f"Other programs kept the host busy while {name} and what stands beside it were measured: what the host does "
        "for their calls is not comparable, while times in graphs are the GPU's alone."
        for name in result.get("disturbed", [])
    ]
    return [
        Heading(3, result["device"]),
        where,
        *_earlier(result),
        *disturbed,
        _times(result, 1e3),
        "Ours launched from Python call by call (µs), the host's part of it, launches, memory beyond the inputs, and "
        "the bytes that must move (the features of both views read, their gradient written) over the time in the "
        "graph.",
        _launched(result),
        _every_figure(result),
        *left_out,
    ]


def _more_section(result: Result) -> list[Block]:
    """A table for each operation."""
    cases: dict[str, goals.Rows] = {}
    found: list[Block] = [
        Heading(3, f"{pictures.where(result)}: {result['set']}"),
        f"{_origin(result)}, {_copy(result)}.",
    ]
    for case in goals.by_case(result):
        cases.setdefault(Case.named(case).op, {})[case] = {}
    for op, names in cases.items():
        rows = [row for row in result["rows"] if row["case"] in names]
        times = _times({**result, "rows": rows}, 1.0 if result["kind"] == "cpu" else 1e3)
        found.append(times._replace(folded=f"{op}: {len(names)} cases"))
    return [*found, _every_figure(result)]


def _model(modelled: list[tuple[model.Measured, float]], picture: list[Block]) -> list[Block]:
    """The GPU model beside the measurement."""
    if not modelled:
        return []
    ratios = [said / row.us for row, said in modelled]
    lines = [
        [row.launch, row.device, row.commit, f"{row.us:.1f}", f"{said:.1f}", f"{said / row.us:.2f}×"]
        for row, said in modelled
    ]
    return [
        Heading(3, "The model of a GPU beside the measurement"),
        "Most development happens without a GPU, by a model of how long the kernels take ([what it is](gpu-model.md)). "
        f"It says {min(ratios):.2f} to {max(ratios):.2f} times what was measured, each kernel as it was then.",
        *picture,
        Table(["kernel", "GPU", "commit", "measured, µs", "model, µs", "model over measured"], lines,
              folded=f"All {len(lines)} kernels"),
    ]  # fmt: skip


def _steps(steps: Sequence[Result]) -> list[Block]:
    """A row for each backbone and step."""
    lines, notes = [], []
    for step in steps:
        config, ours = step["config"], step["rows"][0]["ms"][1]
        name, whole = config["backbone"]["name"], sum(step["parts_ms"].values())
        lines += [
            [f"{name}, {r['contender']}", f"{r['ms'][1]:.2f} ({r['ms'][1] / ours:.2f}×)", f"{r['images_per_s']:.1f}"]
            for r in step["rows"]
        ]
        parts = ", ".join(f"{part} {ms / whole:.1%}" for part, ms in step["parts_ms"].items())
        notes.append(
            f"{name} on {step['device']}: {config['image_size']} pixels, N = {config['batch_size']} and as many twins, "
            f"autocast {config['compute']['amp']}, {step['threads']} threads, torch {step['torch']}, {_origin(step)}. "
            f"The trainer's step taken apart: {parts}."
        )
    ways = [
        [f"{step['config']['backbone']['name']} on {step['device']}, {way}", f"{run['images_per_s']:,.0f}",
         f"{run['whole_run_s']:.0f} s"]
        for step in steps
        for way, run in step.get("whole_runs", {}).items()
        if len(step["whole_runs"]) > 1
    ]  # fmt: skip
    run = Table(["the trainer's own steps, unwaited", "images/s", f"{goals.EPOCHS} epochs, extrapolated"], ways)
    return [Table(["step", "ms (over ours)", "images/s"], lines), *notes, *([run] if ways else [])]


def _method_section(result: Result) -> list[Block]:
    """A row for each method, the fastest first."""
    config = result["config"]
    rows = sorted(result["rows"], key=lambda row: row["ratio"][1])
    return [
        Heading(3, f"Every method's step, {config['backbone']['name']} on {result['device']}"),
        f"{config['image_size']} pixels, batches of {config['batch_size']}, {result['threads']} threads, "
        f"{_origin(result)}: medians of {rows[0]['rounds']} rounds, in each of which every method takes one step. "
        "A ratio is to the baseline's step of the same round, so what slows a whole round is not in it.",
        Table(["method", "time over baseline's"], [[f"`{r['contender']}`", f"{r['ratio'][1]:.2f}×"] for r in rows]),
    ]


def _studies(studies: dict[str, list[dict[str, Any]]]) -> list[Block]:
    """The tables of the studies whose runs are stored; the trainer's own program makes them."""
    if not studies:
        return []
    from trainer.study import grid, table

    found: list[Block] = []
    for name, records in studies.items():
        study = grid.read(name)
        whole = table.of(study, records)
        if whole.lines:
            header, *lines = table.cells(whole)
            header[0] = "method"
            order = sorted(range(len(header)), key=lambda i: header[i] in whole.classes)  # the classes last
            notes = "; ".join(table.footnotes(whole))
            found += [
                Heading(3, study.title),
                " ".join(study.about.split()),
                *_apart(whole),
                Table([header[i] for i in order], [[line[i] for i in order] for line in lines]),
                notes[:1].upper() + notes[1:] + ".",
            ]
    return [Heading(2, "What training with it reaches"), texts.STUDIES, *found] if found else []


def _apart(whole: Any) -> list[Block]:
    """The rows of a study whose difference has an interval that excludes 0, the largest first."""
    there = [line for line in whole.lines if line.difference.n > 1 and abs(line.difference.mean) > line.difference.half]
    if not any(line.difference.n > 1 for line in whole.lines):
        return []
    sides = []
    for sign, word in ((1, "above"), (-1, "below")):
        own = sorted(
            (line for line in there if sign * line.difference.mean > 0), key=lambda line: -abs(line.difference.mean)
        )
        named = "; ".join(f"{x.label} ({x.difference.mean:+.1f} ± {x.difference.half:.1f})" for x in own)
        sides.append(f"**{word} {whole.study.compare}**: {named or 'none'}")
    return [f"Mean accuracy, where the interval of the difference excludes 0: {', '.join(sides)}."]


def _origin(result: Result) -> str:
    of: dict[str, list[str]] = {}
    for contender, commit in result.get("commits", {"": result["commit"]}).items():
        of.setdefault((commit or "unknown")[:9], []).append(contender)
    commits = "; ".join(commit + (f" ({', '.join(names)})" if len(of) > 1 else "") for commit, names in of.items())
    changed = " with local changes" if result["dirty"] else ""
    return f"{result['date'][:10]}, commit{'s' if len(of) > 1 else ''} {commits}{changed}"


def _copy(result: Result) -> str:
    copy = result["copy_gb_per_s"]
    return "copy bandwidth not measured" if copy is None else f"copy bandwidth {copy:.4g} GB/s"


def _times(result: Result, scale: float) -> Table:
    """A row for each case; "-" is a contender that was refused or could not be timed."""
    cases = goals.by_case(result)
    seen = {name for rows in cases.values() for name in rows}
    served_by = {result.get("served_by", {}).get(case) for case in cases}
    backends = [n for n in BACKENDS if n in seen and served_by != {n}]  # else it is ours
    columns = [*backends, *CONTENDERS, *(n for n in MORE_CONTENDERS if n in seen)]
    lines = []
    for case, rows in cases.items():
        ours, *others = (goals.median_ms(rows.get(name)) for name in ("ours", *columns))
        served = result.get("served_by", {}).get(case)
        first = "-" if ours is None else f"{scale * ours:.2f}" + (f" ({served})" if served else "")
        lines.append([case, first, *(_time(scale, ms, ours) for ms in others)])
    return Table(["case", "ours", *columns], lines)


def _time(scale: float, ms: float | None, ours: float | None) -> str:
    if ms is None:
        return "-"
    return f"{scale * ms:.2f}" + (f" ({ms / ours:.2f}×)" if ours else "")


def _launched(result: Result) -> Table:
    lines = []
    for row in (row for row in result["rows"] if row["contender"] == "ours"):
        call = f"{1e3 * row['eager']['both'][1]:.1f}"
        lines.append([row["case"], call, *_cells(row, ("host µs", "launches", "MB", "GB/s", "of copy"))])
    return Table(["case", "call by call", "host", "launches", "MB", "GB/s", "share of copy"], lines)


#: Of a row: the key, a factor and a format.
FIGURES: dict[str, tuple[str, float, str]] = {
    "× identity": ("ratio_to_identity", 1, ".2f"),
    "far caches": ("far_caches", 1, ".0%"),
    "GB/s": ("gb_per_s", 1, ".0f"),
    "of copy": ("share_of_copy", 1, ".0%"),
    "bytes/floor": ("bytes_over_floor", 1, ".2f"),
    "MB": ("peak_extra_bytes", 1e-6, ".1f"),
    "host µs": ("host_ms", 1e3, ".1f"),
    "launches": ("launches", 1, "d"),
    "error": ("error", 1, ".1e"),
}


def _cells(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        key, scale, style = FIGURES[name]
        value = row.get(key)
        found.append("-" if value is None else format(value * scale, style))
    return found


def _every_figure(result: Result) -> Table:
    """Each row's figures; the error of plain eager in the same dtype beside its own."""
    scale, unit = (1.0, "ms") if result["kind"] == "cpu" else (1e3, "µs")
    lines = []
    for case, rows in goals.by_case(result).items():
        eager = _cells(rows.get("plain eager", {}), ("error",))
        for name, row in rows.items():
            if name in BACKENDS and name == result.get("served_by", {}).get(case):
                continue  # it is ours
            forward, backward, both = (row[phase][1] if row.get(phase) else None for phase in PHASES)
            times = ["-" if ms is None else f"{scale * ms:.2f}" for ms in (forward, backward, both)]
            if backward is None and forward and both and result["kind"] == "cuda":
                times[1] = f"({scale * (both - forward):.2f})"
            lines.append([case, name, *times, *_cells(row, list(FIGURES)), *eager])
    header = ["case", "contender", *(f"{phase}, {unit}" for phase in PHASES), *FIGURES]
    return Table([*header, "error of plain eager"], lines, folded=f"Every figure of all {len(lines)} rows")
