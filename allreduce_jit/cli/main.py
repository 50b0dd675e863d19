"""The command line: ``allreduce-jit`` or ``python -m allreduce_jit``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from ..errors import AllReduceError, InputError, SettingsError
from ..harness.report import prepare_streams
from ..settings import Settings
from ..version import __version__
from . import options

_MORE = """\
Started by torchrun, selftest, soak, bench and tune use its ranks. All commands
take --json. NO_COLOR=1 switches colours off. 'allreduce-jit COMMAND --help'
tells more."""
_TUNE = """\
Only all-reduces are timed. Calls with a norm take from the table at which size
they change from one-shot to two-shot."""
_Init = Callable[..., Any]
_Command = Callable[[argparse.Namespace, _Init | None], int]


def main(argv: list[str] | None = None, *, init: _Init | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments without the program's name; default: the process's own.
        init: makes the communicator of every rank instead of ``allreduce_jit.init``; must be importable by name.

    Returns:
        The exit code, one of ``options.EXIT_CODES``. What argparse finds wrong exits with 2.
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
        epilog=options.epilog(more=_MORE),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"allreduce-jit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: _Command, text: str, more: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=options.epilog(name, more),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print one JSON document instead of text")
        sub.set_defaults(run=run)
        return sub

    options.selftest(command("selftest", _selftest, "compare every bit of many all-reduces with the exact sum"))
    options.soak(command("soak", _soak, "run verified traffic for a long time, beside other work if wanted"))
    command("doctor", _doctor, "say what this machine is, which path would run and why")
    options.bench(command("bench", _bench, "time all-reduces of growing size, other libraries' beside them"))
    tune = command("tune", _tune, "measure which algorithm is fastest where on this machine, and keep the table", _TUNE)
    options.gpus(tune, tune, "ranks, one per GPU (default: a run for each number from 2 to all GPUs)")
    options.warmup(command("warmup", _warmup, "compile the kernels into the cache ahead of time"))
    cache = command("cache", _cache, "show or empty the cache of compiled kernels and measured tables")
    cache.add_argument("action", choices=["path", "list", "clear"])
    return parser


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
