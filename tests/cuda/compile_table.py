"""Compile every kernel instance for every supported device: registers, spills, occupancy, 128-bit accesses.

    python tests/cuda/compile_table.py             prints the table of docs/cuda.md; fails where a rule is broken
    python tests/cuda/compile_table.py 80 90       only for these devices

The tests look at a part of it: on A100 and H100 (80 and 90) at all that is counted, elsewhere at what asks for most.

The compiler is NVRTC, called as CuPy calls it and with the options that the backend gives CuPy; no device is needed.
Rules: no spilled register; occupancy of at least 50 % in the kernels that stream; 128-bit loads and stores in the
kernels that handle packs.
"""

from __future__ import annotations

import io
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import instructions

from swl.backends.cupy.compilation import KINDS, NARROWER, OPTIONS, SIZE, instances, kind, module_source

HERE = Path(__file__).parent
ARCHITECTURES = ("75", "80", "86", "90", "100", "120")

COUNTED = ("80", "90")
"""Those whose instructions have a budget: A100 and H100."""

CUPY_ADDS = ("-ftz=true",)
"""What CuPy adds to the options of every compilation: float32 results below the normal numbers become 0."""

# Per multiprocessor: threads, 32-bit registers, shared memory in KiB. CUDA C++ Programming Guide, table of technical
# specifications per compute capability.
PROCESSOR = {
    "75": (1024, 65536, 64),
    "80": (2048, 65536, 164),
    "86": (1536, 65536, 100),
    "90": (2048, 65536, 228),
    "100": (2048, 65536, 228),
    "120": (1536, 65536, 100),
}


ALL = (kind(*{*KINDS} - {"STATS", "PROBS"}), kind(*KINDS))


def modules(architecture: str, sample: bool = False) -> list[tuple[str, ...]]:
    """List the modules that are looked at: of all kinds those of most use, and those that ask for all there is."""
    most = ALL[-1:] if sample else ALL
    found: list[tuple[str, ...]] = [("class_ids",)]
    few = sample and architecture not in COUNTED
    for T in ("float",) if few else SIZE:
        kinds = () if few else ("PLAIN",) if T == "double" else instructions.KINDS
        narrower = () if sample and architecture != "90" else NARROWER.get(T, ())
        found.append(("affine", T))
        found += [("cross_entropy", T, KIND) for KIND in kinds + most]
        found += [("cross_entropy", T, KIND, G) for G in narrower for KIND in ("PLAIN", "SMOOTHING", *most)]
        if int(architecture) >= 90:
            found += [("clusters", T, KIND) for KIND in kinds[:1] + most]
            found += [("clusters", T, KIND, G) for G in narrower for KIND in kinds[:1] + most]
    return found


class Kernel(NamedTuple):
    """What the compiler says of one instance for one device."""

    architecture: str
    name: str
    registers: int
    spilled: int  # bytes
    threads: int  # of a block, the most that the backend launches
    shared: int  # bytes of a block, without a staged row
    occupancy: float
    wide_loads: int
    wide_stores: int  # of 128 bits; 64 where gradients are half as long as logits
    turns: dict[str, instructions.Turn]  # of the sweeps that instructions.py counts

    @property
    def streams(self) -> bool:
        """Whether its rows pass through without being kept."""
        return bool(re.match(r"ce_(rows|cluster)<.*, 0>|ce_partial|ce_backward|fill_rows|column_sums", self.name))

    @property
    def wide(self) -> bool:
        """Whether it handles packs of 16 bytes."""
        rows = r"ce_rows<\w+, [A-Z +]+, (32|0),|ce_cluster|ce_partial|ce_backward<\w+, [A-Z +]+, [248][,>]"
        packs = rf"{rows}|fill_rows|column_sums<.*, [248]>"
        return bool(re.match(packs, self.name))

    def problems(self) -> list[str]:
        stores = self.name.startswith(("ce_backward", "fill_rows")) or re.match(
            r"ce_(rows<\w+, [A-Z +]+, \d+|cluster<\w+, [A-Z +]+), \d+, 4[,>]", self.name
        )
        return [
            *["spills"] * (self.spilled > 0),
            *["occupancy"] * (self.streams and self.occupancy < 0.5),
            *["no 128-bit load"] * (self.wide and not self.wide_loads and not self.name.startswith("fill_rows")),
            *["no wide store"] * bool(self.wide and stores and not self.wide_stores),
        ]


def missing() -> str | None:
    """Say what is not installed, or None."""
    try:
        import cupy.cuda.compiler
    except ImportError as error:
        return f"needs CuPy ({error}): pip install 'swl[test-cuda]'"
    if _package_folder("include/cuda_fp16.h") is None or _package_folder("bin/nvdisasm") is None:
        return "needs CuPy with NVIDIA's headers and disassembler: pip install 'swl[test-cuda]'"
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        return f"needs CuPy with NVRTC ({error}): pip install 'swl[test-cuda]'"
    return None


def _package_folder(file: str) -> Path | None:
    """Give the folder of NVIDIA's packages that has `file`."""
    import nvidia

    found = [path for root in nvidia.__path__ for path in Path(root).glob(f"*/{file}")]
    return found[0].parents[file.count("/")] if found else None


def _launch(name: str, architecture: str) -> tuple[int, int]:
    """Threads and bytes of shared memory of a block."""
    sums = 64 if "<double" in name else 40
    if name.startswith("ce_rows"):
        return (512, 64 + 16 * sums) if ", 0, " in name else (128, 0) if ", 32, " in name else (256, 0)
    return {
        "ce_cluster": (256, 64 + 16 * sums),
        "ce_partial": (256, 8 * sums),
        "ce_combine": (128, 0),
        "ce_backward": (256, 64),
        "fill_rows": (256, 0),
        "column_sums": (256, 256 * (8 if "<double" in name else 4) * int(re.findall(r"\d+(?=>)", name + "1>")[0])),
        "column_totals": (256, 0),
        "prepare_ids": (256, 128),
        "finish_ids": (32, 0),
    }[name.split("<")[0]]


def occupancy(architecture: str, registers: int, threads: int, shared: int) -> float:
    """Share of a multiprocessor's threads that can be resident: registers are given out 256 a warp, memory KiB-wise."""
    most, register_file, kib = PROCESSOR[architecture]
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = register_file // per_warp // (threads // 32)
    by_shared = kib * 1024 // (shared + 1024)  # 1 KiB of each block is the system's
    return min(most // threads, by_registers, by_shared, 32) * threads / most


def disassembled(cubin: bytes) -> str:
    """Return the machine code of a module as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = _package_folder("bin/nvdisasm") / "bin" / "nvdisasm"
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def compile_module(job: tuple[tuple[str, ...], str]) -> list[Kernel]:
    """Compile one module for one device, and read the compiler's report and the machine code."""
    from cupy.cuda.compiler import _NVRTCProgram

    group, architecture = job
    names, log = instances(group), io.StringIO()
    program = _NVRTCProgram(module_source(group), "swl.cu", name_expressions=names, method="cubin")
    include = _package_folder("include/cuda_fp16.h")
    options = (*OPTIONS, *CUPY_ADDS, f"-I{include}/include", f"-arch=sm_{architecture}", "--ptxas-options=-v")
    cubin, lowered = program.compile(options, log)
    report = {}
    for part in log.getvalue().split("Compiling entry function '")[1:]:
        spilled = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill)", part)))
        report[part.split("'")[0]] = int(re.search(r"Used (\d+) registers", part)[1]), spilled
    listing = disassembled(cubin + b"\0")  # CuPy cuts the last byte off, as if it ended a string
    code = {part.split("\n", 1)[0].strip(): part for part in re.split(r"\n\.text\.", listing)}
    found = []
    for name in names:
        mangled = lowered[name]
        text = code[f"{mangled}:"]
        registers, spilled = report[mangled]
        threads, shared = _launch(name, architecture)
        narrower = len(group) > 3  # four 16-bit gradients of four float32 logits
        found.append(
            Kernel(
                architecture,
                name,
                registers,
                spilled,
                threads,
                shared,
                occupancy(architecture, registers, threads, shared),
                len(re.findall(r"\bLDG\.\S*128", text)),
                len(re.findall(rf"\bSTG\.\S*{64 if narrower else 128}", text)),
                instructions.sweeps(name, text),
            )
        )
    return found


def compile_all(
    architectures: tuple[str, ...] = ARCHITECTURES,
    chosen: Callable[[tuple[str, ...]], bool] = bool,
    sample: bool = False,
) -> list[Kernel]:
    """Compile all chosen modules, in two processes."""
    jobs = [(group, a) for a in architectures for group in filter(chosen, modules(a, sample))]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return [kernel for kernels in pool.map(compile_module, jobs, chunksize=1) for kernel in kernels]


def main(architectures: tuple[str, ...]) -> int:
    """Print a line for each kernel: registers for each device; the least occupancy."""
    kernels = compile_all(architectures)
    print(f"| kernel | threads | shared | registers on {', '.join(architectures)} | spilled | occupancy | 128-bit |")
    print("|---|--:|--:|---|--:|--:|---|")
    for name in dict.fromkeys(k.name for k in kernels):
        mine = [k for k in kernels if k.name == name]
        registers = {k.architecture: str(k.registers) for k in mine}
        least = [min(k.wide_loads for k in mine), min(k.wide_stores for k in mine)]
        wide = f"{least[0]} loads, {least[1]} stores" if mine[0].wide else ""
        busy = f"{min(k.occupancy for k in mine):.0%}{' streams' * mine[0].streams}"
        print(
            f"| `{name}` | {mine[0].threads} | {mine[0].shared} | {', '.join(registers.get(a, '–') for a in architectures)} "
            f"| {max(k.spilled for k in mine)} | {busy} | {wide} |"
        )
    broken = [(k.architecture, k.name, k.problems()) for k in kernels if k.problems()]
    print(f"\n{len(kernels)} compilations, {len(broken)} that break a rule")
    for one in broken:
        print(*one)
    return len(broken)


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or ARCHITECTURES) != 0)
