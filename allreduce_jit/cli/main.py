"""The command line: ``allreduce-jit`` or ``python -m allreduce_jit``."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import AllReduceError, InputError, SettingsError
from ..harness.report import parse_size, prepare_streams
from ..policy import backends
from ..policy.catalogue import WORLD_SIZES
from ..policy.operation import DTYPES
from ..settings import Settings

COMPETITORS = ("nccl", "nccl_symm", "torch_one_shot", "torch_two_shot", "sglang", "flashinfer")
_MAX_CPU_RANKS = 16  # soak's sums are exact up to there
_MAX_SECONDS = 1_000_000  # poll and the timeouts of torch count milliseconds in 31 bits
_DTYPES = {name: name for name in ("float", "half", "bfloat16")} | {
    "float32": "float",
    "fp32": "float",
    "float16": "half",
    "fp16": "half",
    "bf16": "bfloat16",
}
_Init = Callable[..., Any]
_Command = Callable[[argparse.Namespace, _Init | None], int]


def main(argv: list[str] | None = None, *, init: _Init | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments without the program's name; default: the process's own.
        init: makes the communicator of every rank instead of ``allreduce_jit.init``; must be importable by name.

    Returns:
        The exit code: 0 well, 1 wrong results or something broken, 2 bad usage (arguments, variables), 130 interrupted.
        What argparse finds wrong exits with 2.
    """
    prepare_streams()
    try:
        try:
            return _run(_parser().parse_args(argv), init)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader, such as head, has seen enough
            print(f"allreduce-jit: {error}", file=sys.stderr)
        _drop_output()
        return 1


def _run(args: argparse.Namespace, init: _Init | None) -> int:
    try:
        if args.command != "doctor":  # which has more to say about them
            Settings.from_env()
        return args.run(args, init)
    except AllReduceError as error:
        print(f"allreduce-jit {args.command}: {error}", file=sys.stderr)
        if args.json and (os.environ.get("RANK") or "0") == "0":
            print(json.dumps({"ok": False, "error": str(error)}))
        return 2 if isinstance(error, (InputError, SettingsError)) else 1


def _drop_output() -> None:
    """Nothing may be left to be flushed at exit to where nothing can be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="allreduce-jit",
        description="Check, explain and measure the all-reduce of this machine's GPUs.",
        epilog="'allreduce-jit COMMAND --help' tells more. Started by torchrun, selftest, soak, bench and tune use its ranks.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: _Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print one JSON document instead of text")
        sub.set_defaults(run=run)
        return sub

    _selftest_arguments(command("selftest", _selftest, "compare every bit of many all-reduces with the exact sum"))
    _soak_arguments(command("soak", _soak, "run verified traffic for long, under load and stalls if wanted"))
    command("doctor", _doctor, "say what this machine is, which path would run and why")
    _bench_arguments(command("bench", _bench, "time all-reduces of growing size, other libraries' beside them"))
    tune = command("tune", _tune, "measure which algorithm is fastest where on this machine, and keep the table")
    _gpu_arguments(tune, tune, "ranks, one per GPU (default: one run for every number from 2 to that of the GPUs)")
    _warmup_arguments(command("warmup", _warmup, "compile the kernels into the cache ahead of time"))
    cache = command("cache", _cache, "show or empty the cache of compiled kernels and measured tables")
    cache.add_argument("action", choices=["path", "list", "clear"])
    return parser


def _selftest_arguments(parser: argparse.ArgumentParser) -> None:
    _rank_arguments(parser)
    parser.add_argument("--max-bytes", type=_size(4), metavar="SIZE", help="largest tensor (default 64M, on the CPU 1M)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")


def _soak_arguments(parser: argparse.ArgumentParser) -> None:
    _rank_arguments(parser)
    add = parser.add_argument
    add("--calls", type=_from(1), metavar="N", help="calls to make at least (default 100000, without --seconds)")
    add("--seconds", type=_seconds, metavar="S", help="how long to go on at most")
    add("--max-bytes", type=_size(4), metavar="SIZE", help="largest tensor (default 1M, on the CPU 16K)")
    add("--seed", type=int, default=0, help="of sizes and inputs (default 0)")
    add("--gemm", action="store_true", help="matrix products on another stream keep all SMs busy")
    add("--nccl", action="store_true", help="NCCL all-reduces on another stream and group alongside")
    add("--stalls", action="store_true", help="random pauses of hosts and devices")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    _rank_arguments(parser)
    add = parser.add_argument
    add("-b", "--min-bytes", type=_size(1), default=1 << 10, metavar="SIZE", help="first size (default 1K)")
    add("-e", "--max-bytes", type=_size(1), metavar="SIZE", help="last size (default 64M, on the CPU 1M)")
    add("-f", "--factor", type=_from(2), default=2, metavar="N", help="from one size to the next (default 2)")
    add("-n", "--iters", type=_from(1), default=20, metavar="N", help="timed bursts of 8 to 200 calls (default 20)")
    add("-w", "--warmup", type=_from(0), default=5, metavar="N", help="bursts before them (default 5)")
    add("-d", "--dtype", type=_dtype, default="bfloat16", help="float, half or bfloat16 (default)")
    add("-o", "--op", choices=["sum"], default="sum", help="the reduction")
    add("-c", "--check", type=int, choices=[0, 1], default=1, help="compare every bit with the exact sum (default 1)")
    add("--seed", type=int, default=0, help="of the inputs (default 0)")
    add("--max-ctas", type=_from(2), metavar="N", help="a communicator that occupies at most so many thread blocks")
    add(
        "--peers",
        type=_competitors,
        default=COMPETITORS,
        metavar="A,B,…",
        help=f"of {', '.join(COMPETITORS)} (default all), or none",
    )
    modes = parser.add_mutually_exclusive_group()
    for mode, text in (("graph", "replayed CUDA graphs"), ("eager", "calls from the host"), ("both", "both (default)")):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=f"time {text}")
    parser.set_defaults(mode="both")
    add("--html", type=_new_file, metavar="FILE", help="also write a page with plots, complete in itself")
    text = "measure nothing, take what --json printed earlier (its table, or its --html)"
    add("--from", dest="source", type=Path, metavar="FILE", help=text)


def _warmup_arguments(parser: argparse.ArgumentParser) -> None:
    worlds = ["all", *map(str, WORLD_SIZES)]
    parser.add_argument("--world-size", choices=worlds, default="all", help="number of ranks (default all)")
    parser.add_argument("--arch", type=_arch, metavar="sm_90", help="to compile for (default: this machine's GPUs)")
    parser.add_argument("--path", choices=[*backends.names(), "all"], default="all", help="whose kernels (default all)")
    operations = parser.add_argument_group("operations")
    operations.add_argument(
        "--op", choices=["all-reduce", "add-rms-norm"], default="all-reduce", help="of which calls (default all-reduce)"
    )
    text = "of add-rms-norm: elements of a row (default 4096 8192)"
    operations.add_argument("--hidden", type=_from(64, 16384), nargs="+", default=[4096, 8192], metavar="N", help=text)
    text = "of add-rms-norm: float32, float16 or bfloat16 (default)"
    operations.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", metavar="DTYPE", help=text)


def _rank_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    text = "ranks to start, one per GPU (default: every GPU if there are two or more, 8 at most; else 4 CPU ranks)"
    _gpu_arguments(parser, where, text)
    where.add_argument("--cpu", type=_from(1, _MAX_CPU_RANKS), metavar="N", help="ranks to start on the CPU instead")


def _gpu_arguments(parser: argparse.ArgumentParser, where: Any, text: str) -> None:
    where.add_argument("--gpus", type=_from(1), metavar="N", help=text)
    parser.add_argument(
        "--deadline", type=_seconds, default=600.0, metavar="S", help="seconds until everything is killed (default 600)"
    )


def _selftest(args: argparse.Namespace, init: _Init | None) -> int:
    from . import selftest

    return selftest.run(args, init)


def _soak(args: argparse.Namespace, init: _Init | None) -> int:
    from . import soak

    return soak.run(args, init)


def _doctor(args: argparse.Namespace, init: _Init | None) -> int:
    from . import doctor

    return doctor.run(args)


def _bench(args: argparse.Namespace, init: _Init | None) -> int:
    from ..bench import bench

    return bench.run(args, init)


def _tune(args: argparse.Namespace, init: _Init | None) -> int:
    from . import tune

    return tune.run(args)


def _warmup(args: argparse.Namespace, init: _Init | None) -> int:
    from . import warmup

    return warmup.run(args)


def _cache(args: argparse.Namespace, init: _Init | None) -> int:
    from . import warmup

    return warmup.run_cache(args)


def _size(least: int) -> Callable[[str], int]:
    def size(text: str) -> int:
        try:
            found = parse_size(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if found < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {least} bytes or more")
        return found

    return size


def _from(least: int, most: int = 10**9) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 20 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least} to {most}")
        return int(text)

    return number


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, more than 0 and at most {_MAX_SECONDS}")
    return value


def _dtype(text: str) -> str:
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(_DTYPES)}")
    return _DTYPES[text]


def _new_file(text: str) -> Path:
    """Refused now what could not be written once everything is measured."""
    folder = os.path.dirname(text) or "."
    if os.path.isdir(text) or not os.path.isdir(folder) or not os.access(text if os.path.exists(text) else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file that can be written, in a folder that exists")
    return Path(text)


def _arch(text: str) -> str:
    if not re.fullmatch(r"sm_\d{2,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an architecture such as sm_90")
    return text


def _competitors(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name and name != "none")
    unknown = [name for name in names if name not in COMPETITORS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {', '.join(COMPETITORS)}, or none")
    return names
