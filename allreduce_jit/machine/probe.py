"""What this rank can see of the machine: one frozen, JSON-able value per rank.

The probe never raises for anything on the machine and creates no CUDA context. What cannot be found out is None
or ``unknown`` and has an entry in ``problems``. It states facts; ``dispatch.decide`` draws the conclusions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ..deprecation import deprecated
from ..errors import InputError
from ..records import Record
from .sources import Sources

_HOST_MEMORY = "host_register_supported", "can_map_host_memory"
_COMPUTE_MODES = {0: "default", 1: "exclusive-thread", 2: "prohibited", 3: "exclusive-process"}


@dataclass(frozen=True)
class Gpu(Record):
    """One GPU.

    Attributes:
        uuid: its name in the world; ordinals depend on ``CUDA_VISIBLE_DEVICES``.
        pci_bus_id, name: as the driver has them.
        compute_capability, sm_count, memory_bytes: (major, minor); what it has.
        mig, virtualization: whether it is a slice; none, passthrough, vgpu, host-vgpu, host-vsga or unknown.
        compute_mode: default, exclusive-thread, prohibited, exclusive-process or unknown.
        maps_host_memory: whether kernels can read and write host memory that is registered with the driver; None: unknown.
    """

    uuid: str
    pci_bus_id: str
    name: str
    compute_capability: tuple[int, int]
    sm_count: int
    memory_bytes: int
    mig: bool
    virtualization: str
    compute_mode: str
    maps_host_memory: bool | None = None


@dataclass(frozen=True)
class Link(Record):
    """From this rank's GPU to another one. None: neither NVML nor the driver could tell.

    Attributes:
        peer_uuid: the other one.
        nvlink, p2p_access, native_atomics: what there is between them.
        performance_rank: the driver's, 0 the best.
        source: who answered: ``nvml+driver``, ``nvml``, ``driver`` or ``none``.
    """

    peer_uuid: str
    nvlink: bool | None
    p2p_access: bool | None
    native_atomics: bool | None
    performance_rank: int | None
    source: str


@dataclass(frozen=True)
class Host(Record):
    """Where the process is; None: unknown.

    Attributes:
        host_id, hostname: the kernel's boot id, which containers of one host share; its name, which they do not.
        pid_namespace, ipc_namespace: which ranks have to share.
        shm_bytes: size of /dev/shm.
        memfd: whether this process can make memory that others can map through a file descriptor.
    """

    host_id: str | None
    hostname: str
    pid_namespace: str | None
    ipc_namespace: str | None
    shm_bytes: int | None
    memfd: bool | None = None


@dataclass(frozen=True)
class Software(Record):
    """Versions; None where missing. Without ``triton`` or ``nvrtc`` that compiler cannot be used.

    Attributes:
        package: this one.
        python, torch, triton, cuda_bindings, cuda_core: what it stands on.
        hip: of a torch for ROCm.
        nvrtc, nvml, driver: of the libraries, and the kernel driver's.
        cuda_driver: the CUDA version that it supports.
    """

    package: str | None
    python: str | None
    torch: str | None
    hip: str | None
    triton: str | None
    cuda_bindings: str | None
    cuda_core: str | None
    nvrtc: str | None
    driver: str | None
    cuda_driver: str | None
    nvml: str | None


@dataclass(frozen=True)
class Capabilities(Record):
    """All that one rank can see of the machine; ``from_dict`` gives back what ``to_dict`` made.

    Attributes:
        device: ``cuda:<ordinal>`` or ``cpu``.
        gpu: None: there is none, or the driver cannot identify it.
        links: to each other GPU.
        fabric: the NVSwitch fabric's state.
        mps: whether MPS serves the GPU.
        host: kernel and namespaces.
        software: versions; None where missing.
        problems: what could not be found out, and why.
    """

    device: str
    gpu: Gpu | None
    links: tuple[Link, ...]
    fabric: str | None
    mps: bool | None
    host: Host
    software: Software
    problems: tuple[str, ...]

    def link_to(self, peer_uuid: str) -> Link | None:
        return next((link for link in self.links if link.peer_uuid == peer_uuid), None)

    def to_json(self) -> dict[str, Any]:
        """Deprecated: ``to_dict``."""
        deprecated("Capabilities.to_json()", "it is called to_dict()")
        return self.to_dict()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Capabilities:
        """Deprecated: ``from_dict``."""
        deprecated("Capabilities.from_json()", "it is called from_dict()")
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Capabilities:
        """What ``to_dict`` made, as the equal value."""
        gpu = data["gpu"]
        if gpu is not None:
            gpu = Gpu(**{**gpu, "compute_capability": tuple(gpu["compute_capability"])})
        parts = {
            "gpu": gpu,
            "links": tuple(Link(**link) for link in data["links"]),
            "host": Host(**data["host"]),
            "software": Software(**data["software"]),
            "problems": tuple(data["problems"]),
        }
        return cls(**{**data, **parts})


def probe(device: Any, sources: Sources | None = None) -> Capabilities:
    """Look at the machine from ``device``: a ``torch.device``, a string like ``cuda:0`` or ``cpu``, or an ordinal.

    Raises:
        InputError: ``device`` is no device. Nothing on the machine makes it raise.
    """
    match = re.fullmatch(r"(cpu)(?::\d+)?|cuda|(?:cuda:)?(\d+)", str(device))
    if match is None:
        raise InputError(f"device {device!r}: expected cpu, cuda, cuda:<ordinal> or an ordinal")
    look = _Probe(sources or Sources())
    if match[1]:
        return look.run(None)
    return look.run(int(match[2]) if match[2] else look.ask("software", "current_device") or 0)


class _Probe:
    """One look. ``ask`` is the only way to a source, so that no failure gets past it."""

    def __init__(self, sources: Sources):
        self.sources = sources
        self.down: set[str] = set()
        self.problems: dict[str, None] = {}  # in order, each once

    def run(self, ordinal: int | None) -> Capabilities:
        gpu, links = None, ()
        if ordinal is None:
            self.down |= {"nvml", "driver"}  # the CPU needs neither, so their absence is no problem
        cuda_driver = self.ask("driver", "version")  # first: a driver that finds no GPU still tells this
        if ordinal is not None:
            seen = {source: self._start(source) for source in ("nvml", "driver")}
            gpu = self._gpu(ordinal)
            links = self._links(ordinal, gpu, seen) if gpu else ()
        mps = self.ask("driver", "attribute", ordinal, "mps_enabled") if gpu else None
        facts = Capabilities(
            device="cpu" if ordinal is None else f"cuda:{ordinal}",
            gpu=gpu,
            links=links,
            fabric=self.ask("nvml", "fabric", gpu.uuid) if gpu else None,
            mps=None if mps is None else bool(mps),
            host=self._host(),
            software=self._software(cuda_driver),
            problems=(),
        )
        self.ask("nvml", "stop")
        return replace(facts, problems=tuple(self.problems))

    def ask(self, source: str, method: str, *args: Any) -> Any:
        if source in self.down:
            return None
        try:
            return getattr(getattr(self.sources, source), method)(*args)
        except Exception as e:  # noqa: BLE001 - whatever a driver or a binding of any version throws is one more fact
            call = f"{source}.{method}({', '.join(map(str, args))})"
            self.problems[f"{call}: {type(e).__name__}: {e}"] = None
            return None

    def _start(self, source: str) -> int:
        count = self.ask(source, "start")
        if count is None:
            self.down.add(source)
        return count or 0

    def _gpu(self, ordinal: int) -> Gpu | None:
        """None if the driver cannot even say which GPU this is: nothing is built upon a half-known one."""
        facts = {name: self.ask("driver", name, ordinal) for name in ("uuid", "pci_bus_id", "name", "memory_bytes")}
        names = ("compute_capability_major", "compute_capability_minor", "multiprocessor_count", "compute_mode")
        major, minor, sms, mode = (self.ask("driver", "attribute", ordinal, name) for name in names)
        if None in facts.values() or None in (major, minor, sms):
            return None
        maps = [self.ask("driver", "attribute", ordinal, name) for name in _HOST_MEMORY]
        # The names betray slices and vGPUs ("A100 MIG 3g.20gb", "NVIDIA A40-48Q") where NVML cannot be asked.
        by_name = "vgpu" if re.search(r"-\d+[ABCQ]$", facts["name"]) else "unknown"
        return Gpu(
            **facts,
            compute_capability=(major, minor),
            sm_count=sms,
            mig=bool(self.ask("nvml", "is_mig", facts["uuid"])) or " MIG " in facts["name"],
            virtualization=self.ask("nvml", "virtualization", facts["uuid"]) or by_name,
            compute_mode=_COMPUTE_MODES.get(mode, "unknown"),
            maps_host_memory=both(*(None if one is None else bool(one) for one in maps)),
        )

    def _links(self, ordinal: int, gpu: Gpu, seen: dict[str, int]) -> tuple[Link, ...]:
        if gpu.mig:  # a slice has no peers, and NVML refuses every question about a pair
            return ()
        known = [self.ask("nvml", "uuid", i) for i in range(seen["nvml"])]
        visible = {self.ask("driver", "uuid", i): i for i in range(seen["driver"])}
        peers = dict.fromkeys(u for u in (*known, *visible) if u not in (None, gpu.uuid))
        return tuple(self._link(ordinal, visible.get(u), gpu.uuid, u) for u in peers)

    def _link(self, ordinal: int, peer: int | None, uuid: str, peer_uuid: str) -> Link:
        def nvml(what: str) -> bool | None:
            return self.ask("nvml", "p2p_status", uuid, peer_uuid, what)

        def driver(what: str) -> int | None:
            return None if peer is None else self.ask("driver", "p2p_attribute", ordinal, peer, what)

        nvlink, atomics, rank = nvml("nvlink"), driver("native_atomic_supported"), driver("performance_rank")
        # The driver decides on a GPU that this process can see; NVML only speaks for the others.
        access = both(nvml("read"), nvml("write")) if peer is None else driver("access_supported")
        atomics = nvml("atomics") if atomics is None else bool(atomics)
        answered = {"nvml": nvlink is not None, "driver": rank is not None}
        return Link(
            peer_uuid=peer_uuid,
            nvlink=atomics if nvlink is None else nvlink,  # native atomics between GPUs mean NVLink
            p2p_access=None if access is None else bool(access),
            native_atomics=atomics,
            performance_rank=rank,
            source="+".join(name for name, spoke in answered.items() if spoke) or "none",
        )

    def _host(self) -> Host:
        name = self.ask("host", "hostname") or "unknown"
        pid, ipc = (self.ask("host", "namespace", kind) for kind in ("pid", "ipc"))
        return Host(self.ask("host", "boot_id"), name, pid, ipc, self.ask("host", "shm_bytes"), self.ask("host", "memfd"))

    def _software(self, cuda_driver: str | None) -> Software:
        return Software(
            package=self.ask("software", "distribution", "allreduce-jit"),
            python=self.ask("software", "python"),
            torch=self.ask("software", "distribution", "torch"),
            hip=self.ask("software", "hip"),
            triton=self.ask("software", "triton"),
            cuda_bindings=self.ask("software", "distribution", "cuda-bindings"),
            cuda_core=self.ask("software", "distribution", "cuda-core"),
            nvrtc=self.ask("software", "nvrtc"),
            driver=self.ask("nvml", "driver_version"),
            cuda_driver=cuda_driver,
            nvml=self.ask("nvml", "version"),
        )


def both(a: bool | None, b: bool | None) -> bool | None:
    """Three-valued *and*: False wins, else unknown wins."""
    if a is False or b is False:
        return False
    return None if a is None or b is None else True
