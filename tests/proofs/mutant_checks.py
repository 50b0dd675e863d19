"""What mutants are run against, the cheapest first, each in a process of its own that has the changed source in place of the real one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import litmus
import mutants
import promises
import test_compile
import test_compile_host
import test_compile_norm
import test_memory_model
import test_twin
import test_twin_host
import test_twin_norm
import torch
import twin
from compare_cubins import kernels
from helpers.cubins import compile_one
from mutants import HOST, NORM, PTX, Mutant
from promises import Case

from allreduce_jit.errors import CompileError
from allreduce_jit.jit import compiler, source
from allreduce_jit.policy.catalogue import KernelSpec, cuda_module, host_algorithms, host_module
from allreduce_jit.policy.norm_catalogue import norm_module
from allreduce_jit.policy.norm_forms import Form

KILLED, SURVIVED, EQUIVALENT, INVALID = "killed", "survived", "equivalent", "does not compile"
QUICK, LONGER, FULL = "quick", "longer", "full"
BROKEN = "no verdict"  # the harness itself failed
SECONDS = 30  # that a check may take, the longest takes 10: threads that spin without looking at memory are no hang to the twin
ARCH = "sm_90"
FAST = "-O0"  # of most mutants the compiler is what takes time


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: ``check`` killed it, in the way ``how``."""

    outcome: str
    check: str = ""
    how: str = ""
    seconds: float = 0.0


Check = tuple[str, Callable[[Path], None]]


def _seeds(name: str, check, seeds, **options) -> list[Check]:
    return [(f"{name}, seed {seed}", lambda objects, seed=seed: check(objects, (), seed, **options)) for seed in seeds]


OF = {test_twin: "", test_twin_host: "path host, ", test_twin_norm: "norm, "}  # before the names of their checks


def _of(module, name: str, seeds) -> list[Check]:
    return _seeds(OF[module] + name, module.CHECKS[name], seeds)


def quick_bare() -> list[Check]:
    """Seconds."""
    return [
        *_of(test_twin, "mixed calls", [0]),
        *_of(test_twin, "absent rank", [0]),
        *_of(test_twin, "host stops a rank", range(3)),
        *_of(test_twin, "calls differ", range(3)),
        *_of(test_twin, "phases", [0]),
        *_of(test_twin, "special values", [0]),
        *_seeds("absent rank, two-shot", test_twin.absent, [0], algorithm="two_shot"),
        *_seeds("absent rank, streamed", test_twin.absent, [0], algorithm="two_shot_stream"),
        *_seeds("2 ranks", test_twin.run_mixed, [0], world_size=2),
    ]


def _promises(check, cases: Sequence[Case], seed: int = 0, **options) -> list[Check]:
    def named(case: Case) -> str:
        return f"{check.__name__}, {case.norm.form.algorithm if case.norm else case.algorithm}, {case.world_size} ranks"

    return [(named(case), lambda objects, case=case: check(objects, (), seed, case, **options)) for case in cases]


EACH = (promises.the_first_cause_counts, promises.a_stopped_rank_believes_nothing, promises.a_peer_tells, promises.concurrent,
        promises.guard_alone, promises.data_alone, promises.alike_at_the_extremes)  # fmt: skip


def promises_bare() -> list[Check]:
    """In half a minute, the limits' third of it at the end."""
    three = promises.cases(0, [3])
    return [
        *_promises(promises.every_bit_is_compared, three[:1]),
        *_promises(promises.every_bit_is_compared, promises.cases(2, [2]), 2, odd=0),
        *_promises(promises.everybody_hears, promises.cases(1, [2, 3]), 1, culprit=0, finder=1),
        *_promises(promises.everybody_hears, three, 0, culprit=1, finder=2),
        *_promises(promises.everybody_hears, three[:1], 1, culprit=2, finder=0),
        *_promises(promises.everybody_hears, promises.WIDE[:2], 0, culprit=0, finder=1),
        *[check for promise in EACH for check in _promises(promise, three[:1], 1)],
        *[check for promise in EACH for check in _promises(promise, [three[1], three[2], *promises.cases(2, [2])], 2)],
        *_promises(promises.alike_at_the_extremes, [Case(epoch=2**32 - 1), Case(epoch=3)]),
        *_promises(promises.data_alone, [Case(name, epoch=5) for name in promises.ALGORITHMS]),
        *_promises(promises.a_mismatch_is_told_at_once, three, 1),
        *_promises(promises.who_gives_up_reports, three, 0),
        *_promises(promises.limits, three[:1], 1),
    ]


def promises_norm() -> list[Check]:
    norms = [Case(kernel.form.algorithm, 3, norm=kernel) for kernel in promises.NORMS]
    return [
        *_promises(promises.everybody_hears, norms, 0, culprit=1, finder=2),
        *[check for promise in EACH for check in _promises(promise, norms[:2], 1)],
        *_promises(promises.every_bit_is_compared, norms[:1], 1),
        *_promises(promises.alike_at_the_extremes, norms[:1], 0),
        *_promises(promises.who_gives_up_reports, norms, 0),
    ]


def promises_host() -> list[Check]:
    """In some seconds."""
    one_shot, two_shot, stream = promises.HOST
    return [
        *_promises(promises.everybody_hears, [one_shot, stream], 0, culprit=0, finder=1),
        *_promises(promises.everybody_hears, [two_shot], 1, culprit=2, finder=0),
        *[check for promise in EACH for check in _promises(promise, [one_shot], 1)],
        *[check for promise in EACH[:3] for check in _promises(promise, [two_shot, stream], 2)],
        *_promises(promises.what_was_settled_stays, [one_shot]),
        *_promises(promises.who_gives_up_reports, promises.HOST),
    ]


def one_cause() -> list[Check]:
    """Of threads that find different ones at the same time."""
    cases = [Case("one_shot", 4), Case("two_shot", 4), Case("host_one_shot", 4), Case("host_two_shot", 4)]
    return [check for seed in range(4) for check in _promises(promises.one_cause, cases, seed)]


def slow_bare() -> list[Check]:
    """More seeds, other world sizes, data races, machine code."""
    return [
        *_of(test_twin, "mixed calls", range(1, 6)),
        *_of(test_twin, "one-shot calls", range(2)),
        *_of(test_twin, "two-shot calls", range(2)),
        *_of(test_twin, "streamed calls", range(3)),
        ("epoch words wrap", lambda objects: test_twin.test_epoch_words_wrap(objects, 2**32 - 1)),
        ("what construction runs", lambda objects: test_twin.test_what_construction_runs(objects, 3, {})),
        ("few SMs, 3 ranks", lambda objects: test_twin.test_a_long_life(objects, 3, {"max_ctas": 3})),
        ("few SMs, 2 ranks", lambda objects: test_twin.test_a_long_life(objects, 2, {"max_ctas": 3})),
        ("no dependent launches", lambda objects: test_twin.test_a_long_life(objects, 3, {"pdl": False})),
        ("sizes", lambda objects: test_twin.test_sizes(objects, 3)),
        *_seeds("5 ranks", test_twin.run_mixed, [0, 1], world_size=5),
        *_seeds("8 ranks", test_twin.run_mixed, [0], world_size=8),
        *_of(test_twin, "ThreadSanitizer", range(2)),
        *[
            (f"machine code of {name}", lambda _, name=name: _machine_code(name))
            for name in ("one_shot", "two_shot", "two_shot_stream")
        ],
    ]


def quick_norm(one: bool = True, two: bool = True) -> list[Check]:
    """Of one-shot, and of two-shot."""
    found = []
    for name, chosen in (("one-shot", one), ("two-shot", two), ("numbers", one), ("one-shot, two packets", one),
                         ("two-shot, two packets", two), ("clusters", one)):  # fmt: skip
        found += _of(test_twin_norm, name, [0]) * chosen
    return [
        *found,
        *_of(test_twin_norm, "least numbers", one * [0]),
        *([("the number of a buffer", lambda _: test_twin_norm.numbered())] if two else []),
        *_of(test_twin_norm, "absent rank", one * [0] + two * [4]),
        *_of(test_twin_norm, "host stops a rank", one * [1] + two * [3]),
        *_of(test_twin_norm, "parameters differ", range(4 if one and two else 0)),
        *_of(test_twin_norm, "calls differ", range(4, 7) if one and two else []),
    ]


def slow_norm() -> list[Check]:
    names = ("one-shot", "two-shot", "numbers", "one-shot, two packets", "two-shot, two packets", "clusters")
    return [
        *[check for name in names for check in _of(test_twin_norm, name, range(1, 3))],
        *[(f"options, {n} ranks", lambda objects, n=n: test_twin_norm.test_bits(objects, n)) for n in (2, 3, 4, 8)],
        *_of(test_twin_norm, "absent rank", [1, 2, 3, 5]),
        *_of(test_twin_norm, "host stops a rank", [0, 2, 4, 5, 6, 7]),
        *_of(test_twin_norm, "ThreadSanitizer", range(1)),
        *_of(test_twin_norm, "ThreadSanitizer, clusters", range(1)),
        ("machine code of norms", lambda _: _machine_code_of_norms()),
    ]


def quick_host() -> list[Check]:
    return [
        *_of(test_twin_host, "mixed calls", [0]),
        *_of(test_twin_host, "streamed calls", [0]),
        *_of(test_twin_host, "absent rank", range(3)),
        *_of(test_twin_host, "a process stops its rank", range(3)),
        *_of(test_twin_host, "calls differ", range(3)),
        *_of(test_twin_host, "special values", [0]),
        *_seeds("path host, absent rank, two-shot", test_twin_host.absent, [0], algorithm="host_two_shot"),
        ("numbers of phases", lambda _: test_twin_host.numbered()),
        *_of(test_twin_host, "many channels", [0]),
        *_of(test_twin_host, "counts wrap", [0]),
    ]


def slow_host() -> list[Check]:
    names = ("mixed calls", "streamed calls", "one-shot calls", "two-shot calls")
    return [
        *[check for name in names for check in _of(test_twin_host, name, range(1, 4))],
        *[check for name in ("absent rank", "a process stops its rank") for check in _of(test_twin_host, name, range(3, 6))],
        *_seeds("path host, 2 ranks", test_twin_host.run_mixed, [0, 1], world_size=2),
        *_seeds("path host, 8 ranks", test_twin_host.run_mixed, [0], world_size=8),
        *_of(test_twin_host, "ThreadSanitizer", range(2)),
        *[(f"machine code of {name}", lambda _, name=name: _machine_code_of_host(name)) for name in HOST_MODULES],
    ]


HOST_MODULES = {"host_one_shot": 2, "host_stream": 2, "host_two_shot": 3}  # with the world size that is looked at
BARE_ALONE = ("one_shot.cu", "two_shot.cu", "partition/flat.cuh", "epilogue/store.cuh", "exchange.cuh", "wait.cuh")
OF_FAILURES = ("failure.cuh", "guard.cuh", "wait.cuh")
WITH_HOST = ("failure.cuh", "guard.cuh", "packet.cuh", "slots.cuh", "wait.cuh")  # of which path host's kernels are made as well


def quick(mutant: Mutant) -> list[Check]:
    """What takes seconds."""
    if mutant.file == PTX:
        return [("memory model", lambda _: _memory_model(mutant))]
    if mutant.file in NORM:
        return quick_norm(one=mutant.file != "two_shot_norm.cu", two=mutant.file != "one_shot_norm.cu")
    return quick_host() if mutant.file in HOST else quick_bare()


def longer(mutant: Mutant) -> list[Check]:
    """What takes up to half a minute: who hears of failures, calls through host memory, and calls with a norm."""
    if mutant.file == PTX:
        return []
    if mutant.file in HOST:
        return promises_host()
    if mutant.file in NORM:
        return promises_norm()
    found = promises_bare() + (quick_host() + promises_host()) * (mutant.file in WITH_HOST)
    if mutant.file in OF_FAILURES:
        return found + _of(test_twin_norm, "parameters differ", [0]) + promises_norm()
    if mutant.file not in BARE_ALONE:
        found += _of(test_twin_norm, "one-shot", [0]) + _of(test_twin_norm, "two-shot", [0])
    return found


def slow(mutant: Mutant) -> list[Check]:
    """What takes up to a minute, for who is left: more seeds, data races, machine code."""
    if mutant.file == PTX:
        return slow_bare()[-3:]
    bare, norm = mutant.file not in (*NORM, *HOST), mutant.file not in (*BARE_ALONE, *HOST)
    host = mutant.file in (*HOST, *WITH_HOST)
    found = one_cause() * (mutant.file in OF_FAILURES) + slow_bare() * bare + slow_host() * host
    found += (quick_norm() * bare + slow_norm()) * norm
    if mutant.kind == mutants.WEAKER:  # which it is there that one sees
        found.sort(key=lambda check: "machine code" not in check[0])
    return found


def every_check(mutant: Mutant) -> list[Check]:
    """All that it may be killed by."""
    return quick(mutant) + longer(mutant) + slow(mutant)


def _machine_code(name: str) -> None:
    spec = cuda_module(name, 4)
    with tempfile.TemporaryDirectory() as folder:
        test_compile.check_module(Path(folder), spec, compile_one(spec, ARCH))


def _machine_code_of_host(name: str) -> None:
    world_size = HOST_MODULES[name]
    with tempfile.TemporaryDirectory() as folder:
        artifact = compile_one(host_module(name, world_size), ARCH)
        test_compile_host.check_module(Path(folder), name, world_size, artifact)


def _machine_code_of_norms() -> None:
    for family, form in ((0, Form("one_shot_norm", 1, 1)), (0, Form("two_shot_norm", 2, 1)), (2, Form("one_shot_norm", 1, 4))):
        spec = norm_module(form, test_compile_norm.FAMILIES[family], 3)
        with tempfile.TemporaryDirectory() as folder:
            artifact = compile_one(spec, ARCH)
            test_compile_norm.check_module(Path(folder), spec, artifact, form, test_compile_norm.FAMILIES[family], 3)


def _memory_model(mutant: Mutant) -> None:
    functions = litmus.ptx_functions(source.files()[PTX])
    for case in litmus.OURS:
        assert litmus.verdict(case, functions) == case.verdict, case.name
    for name, instructions in functions.items():
        assert name in test_memory_model.FUNCTIONS and len(instructions) == len(test_memory_model.FUNCTIONS[name])


def configurations(file: str) -> list[KernelSpec]:
    """Modules that plans can pick and that hold code of this file."""
    found = []
    if file in (*HOST, *WITH_HOST):
        of = {"host_one_shot.cu": ("host_one_shot", "host_stream"), "host_two_shot.cu": ("host_two_shot",)}
        found = [host_module(name, n) for n in (2, 3, 8) for name in host_algorithms(n) if name in of.get(file, (name,))]
    if file in HOST:
        return found
    if file not in NORM:
        of = {
            "one_shot.cu": ("one_shot", "one_shot_wide"),
            "two_shot.cu": ("two_shot", "two_shot_stream", "two_shot_wide", "two_shot_wide2"),
        }
        for world_size in (2, 3, 4, 5, 8):
            found += [cuda_module(name, world_size) for name in twin.algorithms(world_size) if name in of.get(file, (name,))]
    if file not in BARE_ALONE or file == "exchange.cuh":
        for world_size in (3,):
            for one in test_twin_norm.kernels(world_size):
                if file.removesuffix(".cu") in (one.form.algorithm, file):
                    found.append(norm_module(one.form, one.family, world_size))
    return found


def machine_code(spec: KernelSpec) -> dict[str, str]:
    """Digests of a module's kernels, as they are compiled now."""
    compiler._cuda_source.cache_clear()
    found = kernels(compile_one(spec, ARCH).cubin)
    return {name: hashlib.sha256(kernel.code).hexdigest() for name, kernel in found.items()}


def same_machine_code(mutant: Mutant, real: dict[str, str], directory: Path, said: Path) -> bool:
    """Whether the compiler makes the same of it, in every kernel that a plan can pick. That of the real ones is kept in ``directory``."""
    changed = source.files
    for spec in configurations(mutant.file):
        said.write_text(f"at machine code of {spec.name}")  # each has its own time
        kept = directory / f"{spec.name}.{twin.digest(*real.values())}.json"
        if not kept.exists():
            source.files = lambda: real
            own = Path(f"{kept}.{os.getpid()}")
            own.write_text(json.dumps(machine_code(spec)))
            own.rename(kept)
            source.files = changed
        if machine_code(spec) != json.loads(kept.read_text()):
            return False
    return True


def judge(
    mutant: Mutant, directory: Path, depth: str = FULL, only: list[Check] | None = None, limit: float = SECONDS, passed: str = ""
) -> Verdict:
    """Run a mutant against its checks, in a process of its own.

    Args:
        mutant: the change.
        directory: objects of the real sources, which are used where they are the same.
        depth: how far to go, ``QUICK``, ``LONGER`` or ``FULL``: who is left survived.
        passed: how far it came before.
        only: these checks instead, and no look at the machine code.
        limit: seconds of a check; who takes longer is killed by that.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        said = Path(folder, "verdict")
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                verdict = _inside(mutant, directory, Path(folder), depth, only, said, passed)
                said.write_text(json.dumps(verdict))
            except BaseException as error:
                said.write_text(json.dumps([BROKEN, "", repr(error)[:300]]))
            finally:
                os._exit(0)
        check, since = "", start
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if (now := said.read_text() if said.exists() else "") != check:
                check, since = now, time.monotonic()
            if time.monotonic() - since > limit:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.02)
        else:
            try:
                os.killpg(child, signal.SIGKILL)  # executables that wait for requests
            except ProcessLookupError:
                pass
        text = said.read_text() if said.exists() else ""
    if text.startswith("at "):
        text = json.dumps([KILLED, text.removeprefix("at "), "time"])
    outcome, check, how = json.loads(text or json.dumps([BROKEN, "", "no verdict"]))
    return Verdict(outcome, check, how, round(time.monotonic() - start, 1))


def _inside(
    mutant: Mutant, directory: Path, folder: Path, depth: str, only: list[Check] | None, said: Path, passed: str
) -> tuple[str, str, str]:
    torch.set_num_threads(1)  # a fork has none of torch's other threads, and would wait for them
    real = source.files()
    changed = {**real, mutant.file: mutant.applied(real[mutant.file])}
    source.files = lambda: changed
    compiler._cuda_source.cache_clear()
    twin.WARNINGS = ["-w"]
    for built in directory.glob("*.o"):
        os.link(built, folder / built.name)
    twin.OPTIMIZATION = FAST
    if only is not None:
        return _killed(only, folder, said) or (SURVIVED, "", "")
    if not passed and (verdict := _killed(quick(mutant), folder, said)):
        return verdict
    if passed != LONGER and depth != QUICK and (verdict := _killed(longer(mutant), folder, said)):
        return verdict
    if depth != FULL:
        return SURVIVED, "", ""
    twin.OPTIMIZATION = "-O1"
    if mutant.file != PTX:
        signal.alarm(0)
        try:
            if same_machine_code(mutant, real, directory, said):
                return EQUIVALENT, "machine code", "the same"
        except CompileError as error:
            return INVALID, "NVRTC", repr(error)[-300:]
    return _killed(slow(mutant), folder, said) or (SURVIVED, "", "")


def _killed(checks: list[Check], folder: Path, said: Path) -> tuple[str, str, str] | None:
    for name, check in checks:
        said.write_text(f"at {name}")
        signal.alarm(SECONDS + 5)  # also where nobody is left who would end it
        try:
            check(folder)
        except twin.Failed as failure:
            return KILLED, name, failure.kind
        except RuntimeError as error:
            if twin.COMPILER in str(error):
                return INVALID, name, str(error)[-300:]
            return KILLED, name, repr(error)[:200]
        except Exception as error:  # an assertion of the check, or a compiler that refuses
            return KILLED, name, repr(error)[:200]
    return None


def prepare(directory: Path) -> None:
    """Objects of the real sources."""
    import cuda.core  # noqa: F401  # once, not in each process

    twin.WARNINGS = ["-w"]
    directory.mkdir(parents=True, exist_ok=True)
    for twin.OPTIMIZATION in ("-O1", FAST):
        for world_size in (2, 3):
            twin.build(directory, world_size)


def unchanged(file: str) -> Mutant:
    """A mutant without a change, which every check must let pass: or it could not be said to kill one."""
    return Mutant(file, mutants.KINDS[0], 0, "", "", 1, "")
