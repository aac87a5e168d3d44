"""What a library is made of: its sources, the flags of its compilation, and the name that follows from them."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .tools import BuildError, compiler_options, find_compiler, find_nvcc, find_python_headers

_PACKAGE = Path(__file__).resolve().parents[1]
#: In a wheel the sources are inside the package, in a checkout beside it.
SOURCES = next((p for p in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if (p / "head_math.h").exists()), None)

#: What a CUDA library made ahead of time is compiled for; on first use it is only the present GPUs' architectures.
#: "+ptx" is code that later GPUs translate when it is loaded.
AHEAD = ("80", "90a", "100a", "90+ptx")

#: Instruction set -> flags; one source, compiled for each, chosen where it runs.
ISAS = (
    {
        "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512",
        "avx2": "-mavx2 -mfma -mf16c",
        "baseline": "",
    }
    if platform.machine() in ("x86_64", "AMD64")
    else {"baseline": ""}
)
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  #: what torch 2.11 has, and every later one


class Recipe(NamedTuple):
    """One library. Paths are relative to a folder with links to the sources and headers (:meth:`prepare`)."""

    part: str
    flags: str
    objects: dict[str, tuple[str, str]]  #: object -> its source and flags of its own
    libraries: str
    arguments: str  #: of the command ``build`` that builds it
    serves: str = ""  #: the torch and the Python that it serves; any where the stable ABI is all that it uses

    def name(self) -> str:
        """File name with a hash of the sources, flags, platform and ABI.

        No compiler is part of it, so that a library is found where none is installed.
        """
        digest = hashlib.sha256(repr((self, compiler_options(), sys.platform, platform.machine())).encode())
        for file in sorted([*_sources().glob("*.h"), *(_sources() / self.part).glob("*.[ch]*")]):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return f"rebalfer_{self.part}_{digest.hexdigest()[:20]}.so"

    def prepare(self, work: Path) -> None:
        """Write a build.ninja that makes ``library.so`` in ``work``.

        It reaches all else through links, so that no path has to be quoted for ninja, the shell and nvcc.
        """
        compiler = shlex.join(self.compiler()).replace("$", "$$")
        (work / "csrc").symlink_to(_sources())
        (work / "torch").symlink_to(Path(torch.__file__).parent.absolute())
        if self.part == "autograd":
            (work / "python").symlink_to(find_python_headers())
        lines = [
            f"rule compile\n  command = {compiler} {self.flags} $own -c $in -o $out",
            f"rule link\n  command = {compiler} -shared $in -Ltorch/lib {self.libraries} -o $out",
        ]
        for name, (source, own) in self.objects.items():
            lines.append(f"build {name}: compile csrc/{self.part}/{source}\n  own = {own}")
        lines.append(f"build library.so: link {' '.join(self.objects)}")
        (work / "build.ninja").write_text("\n".join(lines) + "\n")

    def compiler(self) -> list[str]:
        """The first words of its command. Raises ToolMissing."""
        if self.part == "autograd":
            find_python_headers()
        if self.part != "cuda":
            return find_compiler()
        if not os.environ.get("CXX"):
            return [find_nvcc()]
        programs = [word for word in find_compiler() if not word.startswith("-")]  # the last one: nvcc calls no ccache
        options = [word for option in compiler_options() for word in ("-Xcompiler", option)]
        return [find_nvcc(), "-ccbin", programs[-1], *options]


def cpu_recipe() -> Recipe:
    flags = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -Wno-ignored-attributes -Wno-psabi"
    objects = {"ops.o": ("ops.cpp", f"{_STABLE_ABI} -Itorch/include")}
    for isa, own in ISAS.items():
        objects[f"{isa}.o"] = ("kernels.cpp", f"{own} -DREBALFER_ISA=kernels_{isa}")
        exact = "-ffp-contract=off -fno-math-errno"  # views round as the reference does; roots are instructions
        objects[f"views_{isa}.o"] = ("views.cpp", f"{own} {exact} -DREBALFER_ISA=views_{isa}")
    return Recipe("cpu", flags, objects, "-ltorch_cpu -lc10", "cpu")


def autograd_recipe() -> Recipe:
    flags = "-std=c++20 -O2 -fPIC -fvisibility=hidden -Itorch/include -Ipython"
    objects = {"head.o": ("head.cpp", ""), "module.o": ("module.cpp", "")}
    serves = f"{torch.__version__} {torch.version.git_version} {sysconfig.get_config_var('SOABI')}"
    return Recipe("autograd", flags, objects, "-ltorch_python -ltorch_cpu -lc10", "cpu", serves)


def cuda_recipe(architectures: Sequence[str]) -> Recipe:
    """``architectures`` such as "90a" or "90+ptx"."""
    code = []
    for architecture in architectures:
        virtual, _, ptx = architecture.partition("+")
        code.append(f"-gencode=arch=compute_{virtual},code={'compute' if ptx else 'sm'}_{virtual}")
    flags = (
        "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wno-psabi -Xfatbin -compress-all "
        f"{' '.join(code)} -DUSE_CUDA {_STABLE_ABI} -Itorch/include -Icsrc"
    )
    # nvcc compiles a .cu for each architecture and leaves a .cpp (torch's headers, 10 s a time) to the C++ compiler.
    sources = sorted(p for p in (_sources() / "cuda").iterdir() if p.suffix in (".cu", ".cpp"))
    objects = {f"{p.stem}.o": (p.name, "") for p in sources}
    if not objects:
        raise BuildError("the CUDA kernels are not part of this version")
    arguments = "cuda" if tuple(architectures) == AHEAD else f"cuda --arch {' '.join(architectures)}"
    return Recipe("cuda", flags, objects, f"{' '.join(code)} -ltorch_cuda -ltorch_cpu -lc10", arguments)


def recipes(part: str, architectures: Sequence[str] | None = None) -> list[Recipe]:
    """Those that serve, the preferred one first: for CUDA the present GPUs' own, then the one made ahead of time."""
    if part != "cuda":
        return [cpu_recipe() if part == "cpu" else autograd_recipe()]
    return [cuda_recipe(a) for a in ([architectures] if architectures else [present_architectures(), AHEAD])]


def present_architectures() -> tuple[str, ...]:
    """Of the visible GPUs; 9.0 and 10.0 have instructions that only their own "a" target knows."""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    names = {(9, 0): "90a", (10, 0): "100a"}
    if not any(c >= (8, 0) for c in capabilities):
        raise BuildError("no GPU of compute capability 8.0 or later")
    return tuple(names.get(c, f"{c[0]}{c[1]}") for c in sorted(capabilities) if c >= (8, 0))


def _sources() -> Path:
    if SOURCES is None:
        raise BuildError("the C++ sources (csrc) are missing")
    return SOURCES
