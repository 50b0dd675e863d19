"""The options of every command, with examples of their use and what exit codes mean. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..policy import backends
from ..policy.catalogue import WORLD_SIZES
from ..policy.norm import QUANTS, ROUNDINGS
from ..policy.operation import DTYPES
from .arguments import COMPETITORS, arch, competitors, dtype, new_file, seconds, several, size_from, whole

_MAX_CPU_RANKS = 16  # soak's sums are exact up to there

EXIT_CODES = {
    0: "all is well",
    1: "wrong results, or something failed; of doctor: GPUs without a kernel path",
    2: "bad usage: arguments, environment variables, GPUs that are not there",
    130: "interrupted (Ctrl-C)",
}
_EXAMPLES = {
    "": {
        "doctor": "what would run here, and why",
        "selftest": "every bit, on every GPU or 4 CPU ranks",
        "bench --html page.html": "times, with plots",
    },
    "selftest": {
        "selftest": "every GPU, or 4 CPU ranks",
        "selftest --gpus 2 --max-bytes 1G": "two GPUs, up to 1 GB",
        "selftest --json > result.json": "for a program to read",
        "torchrun --nproc-per-node 4 -m allreduce_jit selftest": "",
    },
    "soak": {
        "soak --seconds 60": "a minute of small calls",
        "soak --gemm --nccl --stalls": "beside other work, with pauses",
        "soak --op both --calls 1000000": "with norms among them",
    },
    "doctor": {
        "doctor": "as text; the last line is advice",
        "doctor --json": "for a program, or a bug report",
    },
    "bench": {
        "bench": "1K to 64M",
        "bench -b 8 -e 256M --graph": "graphs alone",
        "bench --op add-rms-norm --rows 1,8": "with a norm",
        "bench --json --html page.html > run.json": "to keep",
        "bench --from run.json --html page.html": "a page, later",
    },
    "tune": {
        "tune": "for every number of GPUs",
        "tune --gpus 4": "for four of them",
    },
    "warmup": {
        "warmup": "for this machine's GPUs",
        "warmup --arch sm_90 --world-size 4": "for another GPU, 4 ranks",
        "warmup --op add-rms-norm --hidden 4096": "calls with a norm",
    },
    "cache": {
        "cache list": "what is compiled, and what is not used",
        "cache clear": "remove kernels and measured tables",
    },
}


def epilog(command: str = "", more: str = "") -> str:
    """What stands below the options in ``--help``: examples, and of the program itself (no command) the exit codes."""
    found = {line if line.startswith("torchrun") else f"allreduce-jit {line}": text for line, text in _EXAMPLES[command].items()}
    parts = ["examples:\n" + _columns(found)]
    if not command:
        parts.append("exit codes:\n" + _columns({str(code): text for code, text in EXIT_CODES.items()}))
    return "\n\n".join([*parts, more] if more else parts)


def _columns(rows: Mapping[str, str]) -> str:
    width = max(len(key) for key, text in rows.items() if text)
    return "\n".join(f"  {key:<{width}}  {text}".rstrip() for key, text in rows.items())


def selftest(parser: argparse.ArgumentParser) -> None:
    _rank_arguments(parser)
    parser.add_argument("--max-bytes", type=size_from(4), metavar="SIZE", help="largest tensor (default 64M, on the CPU 1M)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")


def soak(parser: argparse.ArgumentParser) -> None:
    _rank_arguments(parser)
    add = parser.add_argument
    add("--calls", type=whole(1), metavar="N", help="least number of calls (default 100000, without --seconds)")
    add("--seconds", type=seconds, metavar="S", help="stop after S seconds")
    add("--max-bytes", type=size_from(4), metavar="SIZE", help="largest tensor (default 1M, on the CPU 16K)")
    text = "calls to make: all-reduce (default), add-rms-norm, or both, mixed"
    add("--op", choices=["all-reduce", "add-rms-norm", "both"], default="all-reduce", help=text)
    add("--seed", type=int, default=0, help="of sizes and inputs (default 0)")
    add("--gemm", action="store_true", help="matrix products on another stream, to keep all SMs busy")
    add("--nccl", action="store_true", help="NCCL all-reduces on another stream and group")
    add("--stalls", action="store_true", help="random pauses of hosts and devices")


def bench(parser: argparse.ArgumentParser) -> None:
    _rank_arguments(parser)
    add = parser.add_argument
    add("-b", "--min-bytes", type=size_from(1), default=1 << 10, metavar="SIZE", help="first size (default 1K)")
    add("-e", "--max-bytes", type=size_from(1), metavar="SIZE", help="last size (default 64M, on the CPU 1M)")
    add("-f", "--factor", type=whole(2), default=2, metavar="N", help="each size is N times the one before (default 2)")
    add("-n", "--iters", type=whole(1), default=20, metavar="N", help="timed bursts of 8 to 200 calls (default 20)")
    add("-w", "--warmup", type=whole(0), default=5, metavar="N", help="bursts before them (default 5)")
    add("-d", "--dtype", type=dtype, default="bfloat16", help="float, half or bfloat16 (default)")
    add("-o", "--op", choices=["sum", "add-rms-norm"], default="sum", help="the all-reduce (default), or with residual and norm")
    add("-c", "--check", type=int, choices=[0, 1], default=1, help="compare every bit with the exact sum (default 1)")
    add("--seed", type=int, default=0, help="of the inputs (default 0)")
    add("--max-ctas", type=whole(2), metavar="N", help="use at most N thread blocks (V2, host)")
    add(
        "--peers",
        type=competitors,
        default=COMPETITORS,
        metavar="A,B,…",
        help=f"of {', '.join(COMPETITORS)} (default all), or none",
    )
    modes = parser.add_mutually_exclusive_group()
    for mode, text in (("graph", "replayed CUDA graphs"), ("eager", "calls from the host"), ("both", "both (default)")):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=f"time {text}")
    parser.set_defaults(mode="both")
    norm = parser.add_argument_group("add-rms-norm", "with --op add-rms-norm, shapes take the place of sizes")
    text = "(default 1,8,32,128,512,2048, on the CPU 1,8,32)"
    norm.add_argument("--rows", type=several(whole(1)), metavar="N,N,…", help=f"numbers of rows {text}")
    hidden = several(whole(64, 16384))
    norm.add_argument("--hidden", type=hidden, metavar="N,N,…", help="hidden sizes (default 4096,8192, on the CPU 1024)")
    norm.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="R",
        help="as vLLM and TensorRT-LLM (R, default), SGLang (U) or Hugging Face (H) round",
    )
    norm.add_argument(
        "--quant", choices=QUANTS, default="none", help="quantize the norm to FP8 (e4m3) with scales of this kind (default none)"
    )
    add("--html", type=new_file, metavar="FILE", help="also write tables and plots as one HTML page")
    text = "measure nothing: show an earlier --json as a table, or with --html as a page"
    add("--from", dest="source", type=Path, metavar="FILE", help=text)


def warmup(parser: argparse.ArgumentParser) -> None:
    worlds = ["all", *map(str, WORLD_SIZES)]
    parser.add_argument("--world-size", choices=worlds, default="all", help="number of ranks (default all)")
    parser.add_argument("--arch", type=arch, metavar="sm_90", help="architecture to compile for (default: this machine's GPUs)")
    parser.add_argument("--path", choices=[*backends.names(), "all"], default="all", help="kernels of this path (default all)")
    operations = parser.add_argument_group("operations")
    operations.add_argument(
        "--op", choices=["all-reduce", "add-rms-norm"], default="all-reduce", help="kernels of these calls (default all-reduce)"
    )
    text = "of add-rms-norm: hidden sizes (default 4096 8192)"
    operations.add_argument("--hidden", type=whole(64, 16384), nargs="+", default=[4096, 8192], metavar="N", help=text)
    text = "of add-rms-norm: float32, float16 or bfloat16 (default)"
    operations.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", metavar="DTYPE", help=text)


def _rank_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    text = "ranks to start, one per GPU (default: every GPU if there are two or more, 8 at most; else 4 CPU ranks)"
    gpus(parser, where, text)
    where.add_argument("--cpu", type=whole(1, _MAX_CPU_RANKS), metavar="N", help="ranks to start on the CPU instead")


def gpus(parser: argparse.ArgumentParser, where: Any, text: str) -> None:
    where.add_argument("--gpus", type=whole(1), metavar="N", help=text)
    parser.add_argument(
        "--deadline", type=seconds, default=600.0, metavar="S", help="seconds until everything is killed (default 600)"
    )
