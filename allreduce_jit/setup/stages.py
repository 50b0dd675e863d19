"""What all ranks build together, in agreed stages: an engine with its kernels, and further kernels of a live one.

After each stage all ranks exchange how it went. A rank that failed says so instead of leaving the others waiting, and what
failed on any rank is the same ``StepDown`` on all of them.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..errors import CommunicatorFailedError, InputError
from ..policy.operation import OpSpec
from ..policy.verdict import Reason
from .exchange import all_gather_fields

if TYPE_CHECKING:
    from ..engine.base import KernelEngine

log = logging.getLogger("allreduce_jit")


class StepDown(Exception):
    """Some rank could not go on; all ranks hold the same reason."""

    def __init__(self, reason: Reason):
        self.reason = reason


class Stages:
    """Every method is collective: all ranks call it, and all return, or all raise the same ``StepDown``.

    Args:
        group: CPU-capable; what is agreed goes over it.
        device: this rank's, current while a stage runs.
        cache_dir: where cubins are kept.
        timeout_s: seconds to wait for the other ranks after each stage; 0 = for ever.
        timings: seconds are added up here, by name.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        cache_dir: Path | None,
        timeout_s: float,
        timings: MutableMapping[str, float],
    ):
        self.group, self.device, self.cache_dir, self.timeout_s, self.timings = group, device, cache_dir, timeout_s, timings

    def build_engine(self, construct: Callable[[], KernelEngine], families: Sequence[OpSpec]) -> KernelEngine:
        """The engine that ``construct`` makes: with the kernels of ``families``, memory and the peers' memory, verified. If any
        rank fails in any stage, all close what they have."""
        made: list[KernelEngine] = []  # one, unless it cannot even be constructed

        def compile_share() -> list[str]:
            made.append(construct())
            return self._compile_share(made[0], families)

        def load(shares: list) -> str:
            made[0].load(shares, families)
            return made[0].allocate()

        try:
            handles = self._compile_and_load(compile_share, load)
            self._run("map_s", "map-failed", lambda: made[0].connect(handles))
            self._verify(made[0], families)
        except BaseException:
            for engine in made:
                self._close(engine)
            raise
        return made[0]

    def build_kernels(self, engine: KernelEngine, families: Sequence[OpSpec]) -> None:
        """Kernels of ``families`` that a live ``engine`` lacks, verified. A ``StepDown`` does not close it.

        Raises:
            InputError: on every rank, when they ask for different families.
        """
        answers = all_gather_fields(self.group, {"families": [asdict(family) for family in families]}, self.timeout_s)
        for rank, answer in enumerate(answers):
            if answer != answers[0]:
                raise InputError(f"rank {rank} asks for the kernels of {answer['families']}, rank 0 for {answers[0]['families']}")
        load = functools.partial(engine.load, families=families)
        self._compile_and_load(lambda: self._compile_share(engine, families), load)
        self._verify(engine, families)

    def _compile_and_load(self, compile_share: Callable[[], list[str]], load: Callable[[list], Any]) -> list:
        """Each rank compiles a share of the kernels and loads those of all ranks; returns what ``load`` did on each."""
        shares = self._run("build_s", "build-failed", compile_share)
        return self._run("build_s", "build-failed", lambda: load(shares))

    def _compile_share(self, engine: KernelEngine, families: Sequence[OpSpec]) -> list[str]:
        from ..jit.cache import KernelCache

        return engine.compile(KernelCache(self.cache_dir), families)

    def _verify(self, engine: KernelEngine, families: Sequence[OpSpec]) -> None:
        self._run("verify_s", "verify-failed", lambda: engine.verify(families))
        engine.families += [family for family in families if family not in engine.families]  # taken from now on, by all ranks

    def _run(self, timing: str, code: str, work: Callable[[], object]) -> list:
        """Run ``work`` on every rank; returns all results, or raises ``StepDown`` with ``code``."""
        started = time.perf_counter()
        result = problem = None
        waited = False
        try:
            # Whatever device the caller has made the default one, what engines check against is on the CPU.
            with torch.cuda.device(self.device), torch.device("cpu"):
                result = work()
        except Exception as e:  # noqa: BLE001 - whatever it is, the peers must hear of it
            problem, waited = f"{type(e).__name__}: {e}", isinstance(e, CommunicatorFailedError)
        answers = all_gather_fields(self.group, {"problem": problem, "waited": waited, "result": result}, self.timeout_s)
        self.timings[timing] = self.timings.get(timing, 0.0) + time.perf_counter() - started
        failed = [rank for rank, answer in enumerate(answers) if answer["problem"]]
        if failed:
            cause = min(failed, key=lambda rank: bool(answers[rank]["waited"]))  # who timed out is not to blame
            raise StepDown(Reason(code, f"rank {cause}: {answers[cause]['problem']}", cause))
        return [answer["result"] for answer in answers]

    def _close(self, engine: KernelEngine) -> None:
        """Never raises: this rank still has to take the next rung with the others."""
        try:
            with torch.cuda.device(self.device):
                engine.close()
        except Exception as e:  # noqa: BLE001
            log.warning("%s: could not release everything: %s: %s", self.device, type(e).__name__, e)
