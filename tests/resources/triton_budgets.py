"""The Triton kernels as the operators launch them, compiled without a GPU, and what resources each then uses.

A case calls the operators on tensors without memory; what they would launch is recorded, compiled by Triton for each
target and read back: registers, spills, shared memory, tensor-core instructions, 16-byte loads and stores.

    python tests/resources/triton_budgets.py            measure; write the golden file and the tables of docs/triton.md
    python tests/resources/triton_budgets.py --print    measure; print as JSON

The golden file has a part for each version of Triton; only that of the running version is written.
"""

from __future__ import annotations

import collections
import json
import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import cubin  # noqa: E402
import torch  # noqa: E402

GOLDEN = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs/triton.md"

#: arch -> bytes of shared memory a block may have.
TARGETS = {"sm_80": 163 * 2**10, "sm_90": 227 * 2**10, "sm_100": 227 * 2**10, "gfx942": 64 * 2**10}


class Case(NamedTuple):
    """What a head is called on, by default with a weight of the features' dtype."""

    name: str
    channels: int
    side: int
    classes: int
    dtype: str
    layout: str = "channels_last"
    weight: str = ""
    every_kernel: bool = False  #: or the head's only with a detached weight and "none"


CASES = (
    Case("C512-7x7-L7-bf16", 512, 7, 7, "bfloat16"),
    Case("C512-7x7-L7-fp16-w32", 512, 7, 7, "float16", weight="float32", every_kernel=True),
    Case("C512-7x7-L7-fp32", 512, 7, 7, "float32"),
    Case("C2048-7x7-L8-bf16-w32", 2048, 7, 8, "bfloat16", weight="float32"),
    Case("C768-14x14-L11-bf16", 768, 14, 11, "bfloat16"),
    Case("C1280-1x1-L7-bf16", 1280, 1, 7, "bfloat16"),
    Case("C512-7x7-L100-bf16", 512, 7, 100, "bfloat16"),
    Case("C768-14x14-L11-fp32", 768, 14, 11, "float32"),
    Case("C512-7x7-L7-bf16-nchw", 512, 7, 7, "bfloat16", "nchw"),
    Case("C512-7x7-L7-fp32-nchw", 512, 7, 7, "float32", "nchw"),
    Case("C512-14x14-L11-fp16-w32-nchw", 512, 14, 11, "float16", "nchw", weight="float32"),
)


def launched(case: Case, arch: str) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """(kernel, arguments, compiler options) of the forward and backward of the head and its maps, and of views."""
    from rebalfer_kernels import Augment, reference, transforms
    from rebalfer_kernels.triton import host

    caught: list[Any] = []

    def catch(kernel, programs, device, warps=4, stages=1, fused=True, **arguments):
        caught.append((kernel, arguments, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fused}))

    with mock.patch.multiple(host, _launch=catch, arch=lambda index: arch), torch.device("meta"):
        dtype = getattr(torch, case.dtype)
        weight_dtype = getattr(torch, case.weight or case.dtype)
        channels_last = case.layout == "channels_last"
        f = torch.empty(4, case.channels, case.side, case.side, dtype=dtype)
        f = f.contiguous(memory_format=torch.channels_last) if channels_last else f
        w = torch.empty(case.classes, case.channels, dtype=weight_dtype)
        b = torch.empty(case.classes, dtype=weight_dtype)
        y = torch.empty(2, dtype=torch.int64)
        table, v = torch.empty(case.classes, case.classes), torch.empty(case.classes)
        options = (2.0, 2, transforms.TWIN_MAPS["hflip"], True, case.every_kernel)
        wanted = (False, True, True, case.every_kernel)
        _, _, _, logits, _, saved = host.head_forward(f, w, b, y, table, v, *options, *wanted)
        upstreams = (torch.empty(() if case.every_kernel else 2), None, None, None)
        saved_pieces = (2, case.side, case.side, True, True, case.every_kernel)
        flags = (*saved_pieces, 2.0, options[2], case.every_kernel, dtype, channels_last, True, True, True)
        host.head_backward(*upstreams, w, saved, *flags)
        if case.every_kernel:
            host.cam_backward(host.cam_forward(f, w), f, w, dtype, channels_last, True, True)
            host.cross_entropy_forward(logits, y, table, False)
            host.cross_entropy_backward(torch.empty(()), logits, y, table, True)
            everything = Augment(0.5, crop_scale=(0.5, 1), brightness=0.2, contrast=0.2, noise=0.1, erase_probability=1)
            plan = reference.view_plan(everything, (128, 128, 3), (112, 112), [0.5], [0.5])
            images = torch.empty(8, 128, 128, 3, dtype=torch.uint8)
            host.paired_views(images, y, y, None, 0, 0, *plan, options[2], True, dtype)
    return caught


_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def source(kernel: Any, arguments: dict[str, Any]):
    """What Triton would compile at this launch, all tensors aligned."""
    from triton.compiler import ASTSource

    signature, constexprs, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constexprs[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            if name not in kernel.do_not_specialize_on_alignment:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):
            signature[name] = type(value)(*("fp32",) * len(value))
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and name not in kernel.do_not_specialize:
                raise AssertionError(f"{kernel.__name__}: {name} would be compiled anew for its values")
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def measure(case: Case, arch: str) -> dict[str, dict[str, int]]:
    """kernel -> figures."""
    import triton
    from triton.backends.compiler import GPUTarget

    cuda = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if cuda else GPUTarget("hip", arch, 64)
    found = {}
    for kernel, arguments, options in launched(case, arch):
        compiled = triton.compile(source(kernel, arguments), target=target, options=options)
        figures = _nvidia(compiled.asm["cubin"]) if cuda else _amd(compiled.asm["amdgcn"])
        found[kernel.__name__] = figures | {"shared": compiled.metadata.shared, "warps": options["num_warps"]}
    return found


def _nvidia(binary: bytes) -> dict[str, int]:
    (usage,) = cubin.usage(binary).values()
    (instructions,) = cubin.sass(binary).values()
    opcodes = collections.Counter(i.split()[0] for i in instructions)

    def count(pattern: str) -> int:
        return sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))

    return {
        "registers": usage.registers,
        "spilled": usage.stack + usage.local + count(r"LDL|STL"),
        "mma": count(r"[HQ]G?MMA|UTC[HQ]MMA"),
        "loads": count(r"LDG|UBLKCP|UTMALDG"),
        "loads_16": count(r"LDG(STS)?\.(?=.*128)"),
        "stores": count(r"STG"),
        "stores_16": count(r"STG\.(?=.*128)"),
    }


def _amd(assembly: str) -> dict[str, int]:
    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", assembly, re.M))

    return {
        "registers": figure("vgpr_count"),
        "spilled": figure("vgpr_spill_count") + figure("sgpr_spill_count") + figure("private_segment_fixed_size"),
        "mma": count("v_mfma"),
        "loads": count("(global|buffer)_load"),
        "loads_16": count("(global|buffer)_load_dwordx4"),
        "stores": count("(global|buffer)_store"),
        "stores_16": count("(global|buffer)_store_dwordx4"),
    }


def measure_all() -> dict[str, dict[str, int]]:
    """ "case/arch/kernel" -> figures, two processes at a time."""
    # Not by fork: a copy of a process that has threads may wait for one of them for ever.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = {(c.name, arch): pool.submit(measure, c, arch) for c in CASES for arch in TARGETS}
        return {
            f"{name}/{arch}/{kernel}": figures
            for (name, arch), job in jobs.items()
            for kernel, figures in job.result().items()
        }


def render(budgets: dict[str, dict[str, int]], version: str) -> str:
    """The tables of docs/triton.md."""
    lines = [f"Triton {version}, `python tests/resources/triton_budgets.py`."]
    for arch in TARGETS:
        lines += [
            "", f"### {arch}", "",
            "| case | kernel | warps | registers | shared memory, bytes | tensor-core instructions | 16-byte loads "
            "| 16-byte stores |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for variant, f in budgets.items():
            name, of, kernel = variant.split("/")
            if of == arch:
                lines.append(
                    f"| {name} | {kernel.removesuffix('_kernel')} | {f['warps']} | {f['registers']} | {f['shared']:,} "
                    f"| {f['mma']} | {f['loads_16']} of {f['loads']} | {f['stores_16']} of {f['stores']} |"
                )
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- budgets:begin -->\n", "<!-- budgets:end -->"


def insert(page: str, tables: str) -> str:
    before, rest = page.split(BEGIN)
    return before + BEGIN + tables + END + rest.split(END)[1]


def main() -> None:
    import triton

    measured = measure_all()
    if sys.argv[1:] == ["--print"]:
        print(json.dumps({triton.__version__: measured}))
        return
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden[triton.__version__] = measured
    parts = (
        f' "{version}": {{\n' + ",\n".join(f'  "{v}": {json.dumps(f)}' for v, f in figures.items()) + "\n }"
        for version, figures in sorted(golden.items())
    )
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    newest = max(golden, key=lambda v: [int(x) for x in v.split(".")[:2]])
    PAGE.write_text(insert(PAGE.read_text(), render(golden[newest], newest)))


if __name__ == "__main__":
    main()
