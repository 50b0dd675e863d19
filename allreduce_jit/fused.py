"""All-reduces with a norm behind: in one kernel where the path has one, else apart; the same bits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from .describe import FusedFamily
from .errors import InputError, InputTypeError
from .known_norms import KnownNorms
from .norms import quant_of, run_local
from .policy import backends
from .policy.nvlink_norm import APART
from .policy.operation import OpSpec
from .policy.plan import Plan
from .routes import Routes, remember, spec_of
from .setup.stages import StepDown

if TYPE_CHECKING:
    from .engine.protocol import Call
    from .setup.ladder import Ladder

log = logging.getLogger("allreduce_jit")


def check_operations(operations: Sequence[OpSpec]) -> tuple[OpSpec, ...]:
    """``init(operations=)``: families of calls with a norm, each once. Raises ``InputError``, ``InputTypeError``: what is none."""
    if isinstance(operations, OpSpec) or not isinstance(operations, Sequence):
        raise InputTypeError(f"operations={operations!r}: expected a list, such as [allreduce_jit.norm_family(...)]")
    for family in operations:
        if not isinstance(family, OpSpec):
            raise InputTypeError(f"operations: {family!r}: expected what allreduce_jit.norm_family(...) returns")
        if family.operation != "all_reduce_norm" or family.shape is None or family != family.family:
            raise InputError(f"operations: {family}: expected what allreduce_jit.norm_family(...) returns")
    return tuple(dict.fromkeys(operations))


class Norms:
    """The calls with a norm of one communicator.

    Args:
        device, index: its device; ``index`` as ``Tensor.get_device`` has it.
        current: the index of the current device.
        max_ctas: blocks that a kernel may have.
    """

    def __init__(
        self,
        ladder: Ladder,
        routes: Routes,
        device: torch.device,
        index: int,
        rank: int,
        current: Callable[[], int],
        max_ctas: int | None,
    ):
        self._ladder, self._routes, self._current = ladder, routes, current
        self.device, self.index, self.rank = device, index, rank
        row = backends.of(ladder.verdict.path)
        self._fuses = row is not None and "all_reduce_norm" in row.operations
        self._max_ctas = max_ctas if self._fuses else None
        self._calls: dict[OpSpec, Call] = {}
        self._failed: dict[OpSpec, str] = {}  # families that some rank could not build, and why
        self._known = KnownNorms()
        self._where = {"operation": "all_reduce_norm", "device": device, "index": index, "rank": rank}

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        how: tuple,
        scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        residual_out: torch.Tensor | None = None,
        **outs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """One call; arguments as of ``operands``, ``how`` as of ``KnownNorms``."""
        here = self._current() == self.index
        return self._known.make(self._run_of, self._where, here, (x, residual, weight, scale), eps, how, out, residual_out, outs)

    def plan(self, spec: OpSpec) -> Plan:
        """What a call would run; ``apart``: the all-reduce's, and then a kernel of its own."""
        if not spec.rows:
            return Plan(self._ladder.verdict.path.value, "none", 0, 0, 0)
        engine = self._ladder.engine
        if engine is not None and self._may_fuse(spec):
            return engine.plan(spec)
        bare = spec_of(spec.numel, getattr(torch, spec.dtype))
        return replace(self._routes.engine(bare).plan(bare), algorithm=APART)

    def describe(self) -> tuple[FusedFamily, ...]:
        """The families of which there are kernels, or should be."""
        built = [] if self._ladder.engine is None else self._ladder.engine.families
        families = [(family, None) for family in built if family.epilogue is not None]
        return tuple(self._described(family, reason) for family, reason in (*families, *self._failed.items()))

    def note_failed(self, families: Sequence[OpSpec]) -> None:
        """Say so of ``families`` that the ladder had to leave away."""
        if self._ladder.without is not None:
            for family in families:
                self._leave_apart(family, self._ladder.without.text)

    def clear(self) -> None:
        """Hold no engine and no group any more."""
        self._calls.clear()
        self._known.clear()
        self._ladder.stages = None

    # -- internals

    def _described(self, family: OpSpec, reason: str | None) -> FusedFamily:
        norm = family.epilogue
        assert norm is not None
        return FusedFamily(
            operation=family.operation,
            dtype=family.dtype,
            hidden=family.hidden,
            rounding=norm.rounding,
            quantization=norm.quant,
            residual=norm.residual,
            weight=norm.weight,
            weight_bias=norm.weight_bias,
            norm=norm.quant == "none" or norm.keep_norm,
            path=APART if reason else self._ladder.verdict.path.value,
            reason=reason,
        )

    def _may_fuse(self, spec: OpSpec) -> bool:
        """Whether there is, or can be, a kernel that runs calls of ``spec``; the same on all ranks."""
        engine = self._ladder.engine
        fuses = self._fuses and engine is not None and spec.family not in self._failed
        return fuses and engine is not None and engine.plan(spec).algorithm != APART

    def _run_of(self, spec: OpSpec) -> Call:
        return self._calls.get(spec) or self._prepared(spec)

    def _prepared(self, spec: OpSpec) -> Call:
        engine = self._ladder.engine
        if engine is not None and self._may_fuse(spec) and spec.family not in engine.families:
            self._build(spec.family)
        call = engine.prepared(spec) if engine is not None and engine.takes(spec) else partial(self._apart, spec)
        remember(self._calls, spec, call)
        return call

    def _build(self, family: OpSpec) -> None:
        """Collective: all ranks come to their first call of ``family`` at once, as calls come in the same order on all of them."""
        engine, stages = self._ladder.engine, self._ladder.stages
        assert engine is not None and stages is not None, "an engine is built in stages"
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InputError(
                f"rank {self.rank}: the kernels of this call are not built yet, which a CUDA graph cannot capture: ask for "
                "them with init(operations=[allreduce_jit.norm_family(...)]), or make such a call once before the capture"
            )
        try:
            stages.build_kernels(engine, [family])
        except StepDown as step:
            self._leave_apart(family, step.reason.text)

    def _leave_apart(self, family: OpSpec, why: str) -> None:
        self._failed[family] = why
        if self.rank == 0:
            log.warning("norms are kernels of their own behind the all-reduce, the same bits and slower: %s", why)

    def _apart(self, spec: OpSpec, *tensors: torch.Tensor) -> None:
        """The all-reduce, then the norm of its sum."""
        names = [pointer.name for pointer in spec.pointers]
        x, norm = tensors[0], spec.epilogue
        assert norm is not None
        through = x
        if len(self._ladder.processes) > 1:
            # Into where the norm goes; what is quantized has another size.
            kept = "output" if norm.quant == "none" else "norm" if norm.keep_norm else None
            through = torch.empty_like(x) if kept is None else tensors[names.index(kept)]
            self._routes.of(x).call(x, through)
        run_local(replace(spec, operation="norm"), (through, *tensors[1:]), self._max_ctas)


class NormCalls:
    """The part of a ``Communicator`` that makes calls with a norm."""

    _norms: Norms

    def _check_open(self) -> None:
        raise NotImplementedError

    def all_reduce_add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float = 1e-6,
        *,
        weight_bias: int = 0,
        rounding: str = "R",
        out: torch.Tensor | None = None,
        residual_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of ``x`` over all ranks, ``residual`` added, and the RMSNorm of that by the row: the bits of ``all_reduce``
        followed by ``allreduce_jit.add_rms_norm``, in one kernel where the path has one.

        Its kernels are built by the first call of a family (dtype, hidden size and options; see ``norm_family``), on all ranks, unless
        ``init(operations=)`` asked for them. That call cannot be captured.

        Args:
            x, residual, weight, eps, weight_bias, rounding, out, residual_out: as of ``allreduce_jit.add_rms_norm``. ``weight`` has to
                be the same on all ranks, and ``residual``, for the results to be.

        Returns:
            (norm, sum with the residual), like ``x``; on the current stream.

        Raises:
            ClosedError, InputError, InputTypeError, NotDeterministicError, CommunicatorFailedError: as ``all_reduce``.
        """
        self._check_open()
        norm, total = self._norms(
            x, residual, weight, eps, ("none", rounding, weight_bias, False, False), None, out, residual_out
        )
        return norm, total

    def all_reduce_add_rms_norm_fp8(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float = 1e-6,
        *,
        scale: torch.Tensor | None = None,
        scales: str = "static",
        column_major: bool = False,
        with_norm: bool = False,
        weight_bias: int = 0,
        rounding: str = "R",
        out: torch.Tensor | None = None,
        scale_out: torch.Tensor | None = None,
        norm_out: torch.Tensor | None = None,
        residual_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """``all_reduce_add_rms_norm`` whose norm is quantized to e4m3.

        Args:
            others: as of ``allreduce_jit.add_rms_norm_fp8``. A static ``scale`` has to be the same on all ranks.

        Returns:
            (quantized, scales, sum with the residual), and the norm ``with_norm``.

        Raises:
            As ``all_reduce_add_rms_norm``.
        """
        self._check_open()
        how = quant_of(scales, "all_reduce_norm", self._norms.rank), rounding, weight_bias, column_major, with_norm
        return self._norms(x, residual, weight, eps, how, scale, out, residual_out, scale_out=scale_out, norm_out=norm_out)

    def plan_norm(self, rows: int, family: OpSpec) -> Plan:
        """What a call with a norm of so many rows would run; ``family`` as of ``allreduce_jit.norm_family``."""
        self._check_open()
        return self._norms.plan(replace(family, shape=(rows, family.hidden)))
