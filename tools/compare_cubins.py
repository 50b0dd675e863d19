"""Compares the machine code of two versions of the kernels, kernel by kernel. Exits with 1 where it differs.

Usage: python tools/compare_cubins.py BEFORE AFTER [--all]
       python tools/compare_cubins.py --compile CHECKOUT FOLDER [--arch sm_90 ...] [--world-sizes 2 4 8] [--only REGEX]

``BEFORE`` and ``AFTER`` are folders of cubins, as ``--compile`` leaves them, or checkouts, which are compiled first. Needs no
GPU. A kernel is the ``same`` if the bytes of its ``.text`` section are; ``operands`` if the same opcodes follow each other, with
other registers or addresses; ``order`` if they are as many of each, in another order; else ``code``. The table shows what changed in size: instructions (16 bytes each, padding
included), registers, bytes of stack (spills) and of static shared memory. ``--all`` lists kernels that are the same, too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = 16  # bytes, from sm_70 on
REGISTERS, FRAME = 0x2F, 0x11  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE: attributes of .nv.info, by symbol
VALUE_OF_SIZE = 4  # format of an attribute whose value has a length of its own; all others take 4 bytes in all


@dataclass(frozen=True)
class Kernel:
    """What one kernel of a cubin is made of.

    Attributes:
        code: the bytes of its ``.text`` section, with whatever it calls.
        registers: of a thread.
        stack: bytes of a thread, where registers are spilled to and arrays are that no register can hold.
        shared: bytes of static shared memory of a block.
    """

    code: bytes
    registers: int
    stack: int
    shared: int

    @property
    def opcodes(self) -> list[int]:
        """The opcode of each instruction, with the kinds of its operands but without modifiers: its lowest 12 bits."""
        return [word & 0xFFF for (word,) in struct.iter_unpack("<Q8x", self.code)]

    @property
    def figures(self) -> tuple[int, int, int, int]:
        return len(self.code) // INSTRUCTION, self.registers, self.stack, self.shared


def sections(cubin: bytes) -> list[tuple[str, int, int, int, int]]:
    """(name, type, offset, size, link) of every section of a 64-bit ELF file."""
    if not cubin.startswith(b"\x7fELF\x02\x01"):
        raise ValueError("not a 64-bit little-endian ELF file")
    table, entry, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    headers = [struct.unpack_from("<IIQQQQI", cubin, table + i * entry) for i in range(count)]
    strings = headers[names][4]
    return [(text(cubin, strings + h[0]), h[1], h[4], h[5], h[6]) for h in headers]


def text(cubin: bytes, at: int) -> str:
    return cubin[at : cubin.index(0, at)].decode()


def kernels(cubin: bytes) -> dict[str, Kernel]:
    """Every kernel of a cubin by name."""
    found = sections(cubin)
    by_name = {name: (offset, size) for name, _, offset, size, _ in found}
    symbols = symbol_names(cubin, found)
    attributes = by_symbol(cubin, *by_name[".nv.info"])
    result = {}
    for name, (offset, size) in by_name.items():
        if not name.startswith(".text."):
            continue
        kernel = name.removeprefix(".text.")
        symbol = symbols.index(kernel)
        _, shared = by_name.get(f".nv.shared.{kernel}", (0, 0))
        registers, stack = attributes.get((REGISTERS, symbol), 0), attributes.get((FRAME, symbol), 0)
        result[kernel] = Kernel(cubin[offset : offset + size], registers, stack, shared)
    return result


def symbol_names(cubin: bytes, found: list[tuple[str, int, int, int, int]]) -> list[str]:
    (_, _, offset, size, link), *_ = [section for section in found if section[0] == ".symtab"]
    return [text(cubin, found[link][2] + struct.unpack_from("<I", cubin, at)[0]) for at in range(offset, offset + size, 24)]


def by_symbol(cubin: bytes, offset: int, size: int) -> dict[tuple[int, int], int]:
    """The attributes of ``.nv.info`` that are (symbol, value): by (attribute, symbol)."""
    found, at, end = {}, offset, offset + size
    while at < end:
        form, attribute, length = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form != VALUE_OF_SIZE:
            continue
        if length == 8:
            symbol, value = struct.unpack_from("<II", cubin, at)
            found[attribute, symbol] = value
        at += length
    return found


# -- compiling a checkout

# In a process of its own, with the checkout laid out as an installed package.
_COMPILE = """
import re, sys
from pathlib import Path
import cuda.core  # here, not by several threads at once
from allreduce_jit.bench import speed_of_light
from allreduce_jit.jit.cache import KernelCache
from allreduce_jit.jit.compiler import build_all
from allreduce_jit.policy.catalogue import cuda_module, nvlink_algorithms, nvlink_modules, p2p_modules
from allreduce_jit.policy.operation import all_reduce

folder, archs, sizes, only = Path(sys.argv[1]), sys.argv[2].split(","), [int(n) for n in sys.argv[3].split(",")], sys.argv[4]
specs = []
for n in sizes:
    specs += nvlink_modules(n)
    for name in dict.fromkeys(nvlink_algorithms(n) + nvlink_algorithms(n, True)):
        specs += [cuda_module(name, n), cuda_module(name, n, guarded=False)]
        specs += [cuda_module(name, n, virtual_ranks=True)] if n < 5 else []
    specs += [speed_of_light.module(n)]
    specs += p2p_modules(n, [all_reduce("bfloat16")])
specs = [spec for spec in dict.fromkeys(specs) if re.search(only, spec.name)]
jobs = [(spec, arch) for arch in archs for spec in specs]
for (spec, arch), (artifact, _) in zip(jobs, build_all(jobs, KernelCache(None)), strict=True):
    (folder / f"{spec.name}.{arch}.cubin").write_bytes(artifact.cubin)
"""


def compile_checkout(checkout: Path, folder: Path, archs: list[str], world_sizes: list[int], only: str) -> None:
    """Compile the kernels of a checkout into ``folder``, a file ``NAME.ARCH.cubin`` for each module."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as installed:
        package = Path(installed, "allreduce_jit")
        shutil.copytree(checkout / "allreduce_jit", package)
        shutil.copytree(checkout / "kernels/cuda", package / "cuda_kernels")
        shutil.copytree(checkout / "kernels/triton", package / "triton_kernels")
        command = [sys.executable, "-c", _COMPILE, folder.resolve(), ",".join(archs), ",".join(map(str, world_sizes)), only]
        subprocess.run(command, check=True, cwd=installed, env={**os.environ, "PYTHONPATH": installed})


def read(folder: Path, only: str = "") -> dict[str, Kernel]:
    """Every kernel of the cubins in a folder, by ``MODULE.ARCH/KERNEL``."""
    return {
        f"{path.name.removesuffix('.cubin')}/{name}": kernel
        for path in sorted(folder.glob("*.cubin"))
        if re.search(only, path.name.split(".")[0])
        for name, kernel in kernels(path.read_bytes()).items()
    }


# -- comparing


def compare(before: dict[str, Kernel], after: dict[str, Kernel]) -> list[tuple[str, str, Kernel | None, Kernel | None]]:
    """(kernel, verdict, before, after) of every kernel on either side."""
    names = sorted(before.keys() | after.keys())
    return [(name, verdict(before.get(name), after.get(name)), before.get(name), after.get(name)) for name in names]


def verdict(old: Kernel | None, new: Kernel | None) -> str:
    if old is None or new is None:
        return "new" if old is None else "gone"
    if old == new:
        return "same"
    if old.figures != new.figures:
        return "code"
    if old.opcodes == new.opcodes:
        return "operands"
    return "order" if sorted(old.opcodes) == sorted(new.opcodes) else "code"


def table(rows: list[tuple[str, str, Kernel | None, Kernel | None]]) -> str:
    def cell(old: Kernel | None, new: Kernel | None, i: int) -> str:
        values = [str(kernel.figures[i]) if kernel else "-" for kernel in (old, new)]
        return values[0] if values[0] == values[1] else " -> ".join(values)

    head = ("kernel", "", "instructions", "registers", "stack", "shared")
    lines = [head, *((name, verdict, *(cell(old, new, i) for i in range(4))) for name, verdict, old, new in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(value.ljust(width) for value, width in zip(line, widths)).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs=2, type=Path, metavar="PATH")
    parser.add_argument("--compile", action="store_true", help="compile the first path, a checkout, into the second, a folder")
    parser.add_argument("--arch", nargs="+", default=["sm_90"])
    parser.add_argument("--world-sizes", nargs="+", type=int, default=list(range(2, 9)))
    parser.add_argument("--only", default="", metavar="REGEX", help="modules whose name has a match")
    parser.add_argument("--all", action="store_true", help="list kernels that are the same, too")
    args = parser.parse_args()
    if args.compile:
        compile_checkout(*args.paths, args.arch, args.world_sizes, args.only)
        return 0
    sides = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, path in enumerate(args.paths):
            if (path / "allreduce_jit").is_dir():
                compile_checkout(path, Path(scratch, str(i)), args.arch, args.world_sizes, args.only)
                path = Path(scratch, str(i))
            sides.append(read(path, args.only))
    rows = compare(*sides)
    different = [row for row in rows if row[1] != "same"]
    if args.all or different:
        print(table(rows if args.all else different))
    counts = Counter(row[1] for row in rows)
    print(f"{len(rows)} kernels: {', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}")
    return 1 if different or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
