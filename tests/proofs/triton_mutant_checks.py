"""What mutants of the Triton sources are run against, the cheapest first: scenarios in Triton's interpreter (``legacy_ranks``), and the local
norm there."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import legacy_ranks
import test_compile
import test_legacy_protocol as protocol
import test_norm_kernel
from legacy_ranks import Outcome, Scenario, Stage
from mutant_checks import INVALID, KILLED, SURVIVED, Verdict
from mutants import WEAKER, Mutant
from norm_interpreter import Crashed, play
from triton_mutants import FOLDER, NORM, texts

from allreduce_jit.errors import CompileError
from allreduce_jit.policy.catalogue import P2P_ALGORITHMS, triton_module

LIMIT = 10  # seconds of a scenario, the longest takes 2, with eight ranks 10; a mutant that never ends is killed by it
PATIENCE = 3000  # looks until a wait gives up, where it is no matter of the scenario; a twentieth of a second's is enough for the real ones
WIDTHS = [72, 384]
MACHINE_CODE = "machine code"  # the name of that check

Check = tuple[str, Callable[["Planted"], object]]


class Planted:
    """Plays scenarios with other sources."""

    def __init__(self, stage: Stage, folder: Path):
        self.stage, self.folder = stage, folder

    def run(self, scenario: Scenario, timeout: float = LIMIT) -> Outcome:
        deadline = min(scenario.deadline, PATIENCE)
        return self.stage.run(
            dataclasses.replace(scenario, source=str(self.folder), deadline=deadline), LIMIT if scenario.world < 8 else 4 * LIMIT
        )


def _scenario(name: str) -> Check:
    def check(stage) -> None:
        wrong = protocol.fails(stage.run(protocol.scenario(name)), name)
        assert wrong is None, wrong

    return name, check


def checks() -> list[Check]:
    """Of a second each; a test of ``test_legacy_protocol`` is one, with the sources of a mutant."""
    mixed = [
        _scenario(name) for name in ("repeated", "specials", "rounding", "differing", "busy", "absent", "absent, one rank hasty")
    ]
    absent = [("one_shot", 2, 1), ("two_shot", 3, 1), ("one_shot", 4, 2), ("two_shot", 2, 0)]
    differ = [(3, {"numel": 39}), (2, {"algorithm": "two_shot"}), (2, {"dtype": "bfloat16"})]
    order = [
        "gone after the first",
        "late at first",
        "late at first, 8 ranks",
        "one rank slow",
        "first half last",
        "second half last",
        "stopped midway",
        "torn",
    ]
    return [
        *mixed,
        *[(f"absent rank, {a}, {n} ranks", lambda stage, a=a, n=n, k=k: protocol.test_an_absent_rank_is_named(stage, a, n, k)) for a, n, k in absent],
        ("dies between the phases", protocol.test_a_rank_that_dies_between_the_phases_is_named),
        ("channel", protocol.test_the_channel_that_waited_is_reported),
        *[(f"aborted, {a}", lambda stage, a=a: protocol.test_an_aborted_rank_says_nothing_and_believes_nothing(stage, a)) for a in protocol.ALGORITHMS],
        *[(f"calls differ, {how}", lambda stage, n=n, how=how: protocol.test_calls_that_differ_are_named(stage, n, how)) for n, how in differ],
        ("late and different", protocol.test_who_is_late_is_named_though_another_call_differs),
        *[(f"numbers beyond 32 bits, {others:#x}", lambda stage, others=others: protocol.test_numbers_of_elements_are_compared_beyond_32_bits(stage, others)) for others in protocol.BEYOND_32_BITS],
        ("each compares", lambda stage: protocol.test_each_rank_compares_for_itself(stage, 0)),
        ("grace by shape", protocol.test_the_grace_is_over_for_a_shape_and_for_no_other),
        ("as time runs out", protocol.test_what_arrives_as_time_runs_out_counts),
        ("in place", protocol.test_one_rank_in_place_and_the_other_not),
        *map(_scenario, order),
        ("no deadline", protocol.test_no_deadline_no_report),
        *[(f"{n} ranks", lambda stage, n=n: protocol.test_every_world_dtype_and_algorithm(stage, n)) for n in (2, 5, 8)],
        *[(f"a long life, seed {seed}", lambda stage, seed=seed: protocol.test_a_long_life_under_random_delays(stage, seed)) for seed in range(3)],
    ]  # fmt: skip


class Judge:
    """Runs mutants; each thread that asks has a stage of its own."""

    def __init__(self, jobs: int):
        self.stages: queue.SimpleQueue[Stage] = queue.SimpleQueue()
        for _ in range(jobs):
            self.stages.put(Stage(errors=subprocess.DEVNULL))

    @contextlib.contextmanager
    def _stage(self) -> Iterator[Stage]:
        stage = self.stages.get()
        try:
            yield stage
        finally:
            self.stages.put(stage)

    def judge(self, mutant: Mutant, first: str | None = None) -> Verdict:
        """What becomes of it, the check ``first`` before all others."""
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            sources = Path(
                shutil.copytree(legacy_ranks.source(), f"{folder}/kernels", ignore=shutil.ignore_patterns("__pycache__"))
            )
            name = mutant.file.removeprefix(FOLDER)
            (sources / name).write_text(mutant.applied(texts()[mutant.file]))
            steps = [self._norm] if name == NORM else [lambda sources: self._protocol(sources, first), self._machine_code]
            if mutant.kind == WEAKER or first == MACHINE_CODE:
                steps.reverse()
            for step in steps[: 1 if mutant.kind == WEAKER else None]:
                outcome = step(sources)
                if outcome[0] != SURVIVED:
                    break
        return Verdict(*outcome, seconds=round(time.monotonic() - start, 1))

    @staticmethod
    def _machine_code(sources: Path) -> tuple[str, str, str]:
        """Strength and scope of accesses, and a barrier, which the interpreter does not know."""
        for name in P2P_ALGORITHMS:
            spec = triton_module(name, 2, "bfloat16", True)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    artifact = test_compile.compile_triton_from(sources, spec)
                except CompileError as error:
                    return INVALID, MACHINE_CODE, str(error)[-200:]
                try:
                    test_compile.check_strong_accesses(Path(folder), spec, artifact)
                except AssertionError as error:
                    return KILLED, MACHINE_CODE, str(error).strip().replace("\n", " ")[:200]
        return SURVIVED, "", ""

    @staticmethod
    def _norm(sources: Path) -> tuple[str, str, str]:
        """The small rows, and then all that the test of bits has."""
        for name, cases in (("local norm", test_norm_kernel.cases(WIDTHS)), ("local norm, all", test_norm_kernel.every_case())):
            try:
                wrong = play({"mutant": str(sources)}, list(cases), first=True)["mutant"]
            except Crashed as crash:
                return KILLED, name, str(crash)[-200:]
            if wrong:
                return (INVALID if "Error: " in wrong[0] else KILLED), name, wrong[0][-200:]
        return SURVIVED, "", ""

    def _protocol(self, sources: Path, first: str | None) -> tuple[str, str, str]:
        with self._stage() as stage:
            return self._checked(Planted(stage, sources), first)

    @staticmethod
    def _checked(planted: Planted, first: str | None) -> tuple[str, str, str]:
        for name, check in sorted(checks(), key=lambda check: check[0] != first):
            try:
                check(planted)
            except TimeoutError:
                return KILLED, name, "time"
            except AssertionError as error:
                return (INVALID if "ranks raised" in str(error) else KILLED), name, str(error).strip().replace("\n", " ")[-200:]
            except Exception as error:  # what the host makes of a report that is none
                return KILLED, name, repr(error)[:200]
        return SURVIVED, "", ""

    def close(self) -> None:
        while not self.stages.empty():
            self.stages.get().close()
