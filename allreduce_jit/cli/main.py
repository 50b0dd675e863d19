"""The command line: ``allreduce-jit`` or ``python -m allreduce_jit``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import AllReduceError, InputError, SettingsError
from ..harness.report import prepare_streams
from ..policy import backends
from ..policy.catalogue import WORLD_SIZES
from ..policy.norm import QUANTS, ROUNDINGS
from ..policy.operation import DTYPES
from ..settings import Settings
from .arguments import COMPETITORS, arch, competitors, dtype, new_file, seconds, several, size_from, whole

_MAX_CPU_RANKS = 16  # soak's sums are exact up to there
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
    tune.epilog = "Times all-reduces alone; calls with a norm take of the table from which size on they are two-shot."
    _gpu_arguments(tune, tune, "ranks, one per GPU (default: one run for every number from 2 to that of the GPUs)")
    _warmup_arguments(command("warmup", _warmup, "compile the kernels into the cache ahead of time"))
    cache = command("cache", _cache, "show or empty the cache of compiled kernels and measured tables")
    cache.add_argument("action", choices=["path", "list", "clear"])
    return parser


def _selftest_arguments(parser: argparse.ArgumentParser) -> None:
    _rank_arguments(parser)
    parser.add_argument("--max-bytes", type=size_from(4), metavar="SIZE", help="largest tensor (default 64M, on the CPU 1M)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")


def _soak_arguments(parser: argparse.ArgumentParser) -> None:
    _rank_arguments(parser)
    add = parser.add_argument
    add("--calls", type=whole(1), metavar="N", help="calls to make at least (default 100000, without --seconds)")
    add("--seconds", type=seconds, metavar="S", help="how long to go on at most")
    add("--max-bytes", type=size_from(4), metavar="SIZE", help="largest tensor (default 1M, on the CPU 16K)")
    text = "which calls: all-reduce (default), add-rms-norm, or both in one mix"
    add("--op", choices=["all-reduce", "add-rms-norm", "both"], default="all-reduce", help=text)
    add("--seed", type=int, default=0, help="of sizes and inputs (default 0)")
    add("--gemm", action="store_true", help="matrix products on another stream keep all SMs busy")
    add("--nccl", action="store_true", help="NCCL all-reduces on another stream and group alongside")
    add("--stalls", action="store_true", help="random pauses of hosts and devices")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    _rank_arguments(parser)
    add = parser.add_argument
    add("-b", "--min-bytes", type=size_from(1), default=1 << 10, metavar="SIZE", help="first size (default 1K)")
    add("-e", "--max-bytes", type=size_from(1), metavar="SIZE", help="last size (default 64M, on the CPU 1M)")
    add("-f", "--factor", type=whole(2), default=2, metavar="N", help="from one size to the next (default 2)")
    add("-n", "--iters", type=whole(1), default=20, metavar="N", help="timed bursts of 8 to 200 calls (default 20)")
    add("-w", "--warmup", type=whole(0), default=5, metavar="N", help="bursts before them (default 5)")
    add("-d", "--dtype", type=dtype, default="bfloat16", help="float, half or bfloat16 (default)")
    add("-o", "--op", choices=["sum", "add-rms-norm"], default="sum", help="sum (default), or with residual and norm behind it")
    add("-c", "--check", type=int, choices=[0, 1], default=1, help="compare every bit with the exact sum (default 1)")
    add("--seed", type=int, default=0, help="of the inputs (default 0)")
    add("--max-ctas", type=whole(2), metavar="N", help="a communicator that occupies at most so many thread blocks")
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
    norm = parser.add_argument_group("add-rms-norm", "rows times elements of a row in place of sizes")
    text = "(default 1,8,32,128,512,2048, on the CPU 1,8,32)"
    norm.add_argument("--rows", type=several(whole(1)), metavar="N,N,…", help=f"how many {text}")
    hidden = several(whole(64, 16384))
    norm.add_argument("--hidden", type=hidden, metavar="N,N,…", help="elements of a row (default 4096,8192, on the CPU 1024)")
    norm.add_argument("--rounding", choices=ROUNDINGS, default="R", help="where it rounds (default R)")
    norm.add_argument("--quant", choices=QUANTS, default="none", help="to e4m3, with such scales (default none)")
    add("--html", type=new_file, metavar="FILE", help="also write a page with plots, complete in itself")
    text = "measure nothing, take what --json printed earlier (its table, or its --html)"
    add("--from", dest="source", type=Path, metavar="FILE", help=text)


def _warmup_arguments(parser: argparse.ArgumentParser) -> None:
    worlds = ["all", *map(str, WORLD_SIZES)]
    parser.add_argument("--world-size", choices=worlds, default="all", help="number of ranks (default all)")
    parser.add_argument("--arch", type=arch, metavar="sm_90", help="to compile for (default: this machine's GPUs)")
    parser.add_argument("--path", choices=[*backends.names(), "all"], default="all", help="whose kernels (default all)")
    operations = parser.add_argument_group("operations")
    operations.add_argument(
        "--op", choices=["all-reduce", "add-rms-norm"], default="all-reduce", help="of which calls (default all-reduce)"
    )
    text = "of add-rms-norm: elements of a row (default 4096 8192)"
    operations.add_argument("--hidden", type=whole(64, 16384), nargs="+", default=[4096, 8192], metavar="N", help=text)
    text = "of add-rms-norm: float32, float16 or bfloat16 (default)"
    operations.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", metavar="DTYPE", help=text)


def _rank_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    text = "ranks to start, one per GPU (default: every GPU if there are two or more, 8 at most; else 4 CPU ranks)"
    _gpu_arguments(parser, where, text)
    where.add_argument("--cpu", type=whole(1, _MAX_CPU_RANKS), metavar="N", help="ranks to start on the CPU instead")


def _gpu_arguments(parser: argparse.ArgumentParser, where: Any, text: str) -> None:
    where.add_argument("--gpus", type=whole(1), metavar="N", help=text)
    parser.add_argument(
        "--deadline", type=seconds, default=600.0, metavar="S", help="seconds until everything is killed (default 600)"
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
