"""The table of backends: every path with kernels of our own, the highest rung first.

Dispatch, ladder, doctor, warmup and the command line read this table. A new rung is a row here, an engine of its own
and a name in ``Path``; below the last row there is torch.distributed, which has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..paths import Path
from ..settings import V2_SWITCH, VARIABLES
from . import checks, norm_catalogue, tuning
from .catalogue import KernelSpec, host_modules, p2p_modules
from .checks import Check, Group, first_rank, unmet
from .operation import ALL_REDUCE, OpSpec
from .verdict import Reason


@dataclass(frozen=True)
class Toolchain:
    """What compiles a backend's kernels.

    Attributes:
        name: as people call it.
        fact: the field of ``Capabilities.software`` with its version.
        module: what cannot be imported where it is missing.
        distribution: what is to be installed then.
    """

    name: str
    fact: str
    module: str
    distribution: str

    def installed(self, group: Group) -> Reason | None:
        """A check: every rank has it."""

        def text(c) -> str:
            return f"has no {self.name}{checks.problem(c, f'software.{self.fact}')}"

        return first_rank(group.caps, f"no-{self.fact}", text, lambda c: getattr(c.software, self.fact) is None)


NVRTC = Toolchain("NVRTC", fact="nvrtc", module="cuda.core", distribution="cuda-core")
TRITON = Toolchain("Triton", fact="triton", module="triton", distribution="triton")


@dataclass(frozen=True)
class Backend:
    """One row.

    Attributes:
        name: what it is, inside the package.
        path: what users call it.
        requires: of the machine, in this order, beside ``checks.COMMON``.
        toolchain: what compiles its kernels.
        modules: (world size, families of calls, architecture) -> the modules that those calls may run.
        operations: those that its kernels do.
        engine: ``module:class``, imported once it is to be built.
        memory: where staging memory is: ``device`` (CUDA IPC, mapped by peers) or ``host`` (pinned, a memfd that all have mapped).
        tunable: what ``allreduce-jit tune`` can measure of it; None: nothing.
        switch: the environment variable that turns this backend off alone.
        why: code and text of the reason to give where nothing was stepped down from; ``{n}``: how many ranks.
    """

    name: str
    path: Path
    requires: tuple[Check, ...]
    toolchain: Toolchain
    modules: Callable[[int, Sequence[OpSpec], str | None], list[KernelSpec]]
    engine: str
    operations: tuple[str, ...] = ("all_reduce",)
    memory: str = "device"
    tunable: tuning.Tunable | None = None
    switch: str | None = None
    why: tuple[str, str] | None = None

    def obstacle(self, group: Group) -> Reason | None:
        """Why this group cannot have it; None: it can, as far as can be told without building it."""
        return unmet((self._switched_off, self._path_forced, *self.requires, self.toolchain.installed), group)

    def possible(self, ranks: int) -> tuple[Reason, ...]:
        """The reasons of a verdict for it, where it is the highest rung."""
        return () if self.why is None else (Reason(self.why[0], self.why[1].format(n=ranks)),)

    def unwanted(self, text: str) -> Reason:
        """The reason where it is possible, and the caller wants none of it."""
        return Reason(self._off if self.switch else "path-forced", text)

    @property
    def _off(self) -> str:
        return f"{self.path}-switched-off"

    def _switched_off(self, group: Group) -> Reason | None:
        if self.switch is None:
            return None
        field = VARIABLES[self.switch][0]
        return first_rank(group.settings, self._off, f"has {self.switch} off", lambda s: not getattr(s, field))

    def _path_forced(self, group: Group) -> Reason | None:
        """The first rank with the lowest choice, as that one counts; ``checks.kernels_allowed`` came before."""
        below = [row.path.short for row in BACKENDS[BACKENDS.index(self) + 1 :]]
        lowest = max((s.path for s in group.settings if s.path in below), key=below.index, default=None)
        return first_rank(group.settings, "path-forced", f"has ALLREDUCE_JIT_PATH={lowest}", lambda s: s.path == lowest)


BACKENDS: tuple[Backend, ...] = (
    Backend(
        name="nvlink",
        path=Path.V2,
        requires=(checks.fabric_ready, checks.full_nvlink, checks.peer_access),
        toolchain=NVRTC,
        modules=norm_catalogue.modules,
        engine="allreduce_jit.engine.nvlink:NvlinkEngine",
        operations=("all_reduce", "all_reduce_norm"),
        tunable=tuning.V2,
        switch=V2_SWITCH,
        why=("full-nvlink", "NVLink and peer access between all {n} GPUs"),
    ),
    Backend(
        name="p2p",
        path=Path.LEGACY,
        requires=(checks.peer_access,),
        toolchain=TRITON,
        modules=p2p_modules,
        engine="allreduce_jit.engine.p2p:P2PEngine",
        tunable=tuning.LEGACY,
    ),
    Backend(
        name="host",
        path=Path.HOST,
        requires=(checks.no_better_way, checks.host_memory, checks.shared_memory),
        toolchain=NVRTC,
        modules=host_modules,
        engine="allreduce_jit.engine.host:HostEngine",
        memory="host",
        tunable=tuning.HOST,
    ),
)


def of(path: Path) -> Backend | None:
    """The row of ``path``; None for torch.distributed."""
    return next((row for row in BACKENDS if row.path is path), None)


def names() -> list[str]:
    """The paths with kernels, as users call them, the highest first."""
    return [row.path.value for row in BACKENDS]


def modules(path: str, world_size: int, families: Sequence[OpSpec] = ALL_REDUCE, arch: str | None = None) -> list[KernelSpec]:
    """The modules that ``init`` builds on ``path``, as users call it, for calls of ``families``, without ``max_ctas``."""
    row = next(row for row in BACKENDS if row.path.value == path)
    return row.modules(world_size, [family for family in families if family.operation in row.operations], arch)


def wishes() -> list[str]:
    """The fields of ``Settings`` that say which paths a rank wants."""
    return ["path", *(VARIABLES[row.switch][0] for row in BACKENDS if row.switch)]
