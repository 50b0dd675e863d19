"""Machines from tables: fake sources for the probe, one table a file in ``machines/``.

A table lists hosts (GPUs in NVML's order; ``nvlink``, ``p2p``, ``atomics`` and ``performance_rank`` one row a GPU,
one character a peer), ranks (``visible``: what CUDA_VISIBLE_DEVICES leaves, as indices into the host's GPUs) and the
expected verdict. ``recorded`` says whether the facts were read from such a machine or declared from what is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allreduce_jit.machine.probe import Capabilities, probe
from allreduce_jit.machine.sources import Sources

MACHINES = {f.stem: json.loads(f.read_text()) for f in sorted((Path(__file__).parent / "machines").glob("*.json"))}


class NotSupported(Exception):
    pass


@dataclass
class FakeNvml:
    host: dict

    def start(self) -> int:
        if "missing" in self.host["nvml"]:
            raise OSError(self.host["nvml"]["missing"])
        self.uuids = list(dict.fromkeys(g.get("parent_uuid", g["uuid"]) for g in self.host["gpus"]))
        return len(self.uuids)

    def stop(self) -> None:
        pass

    def version(self) -> str:
        return self.host["nvml"]["version"]

    def driver_version(self) -> str:
        return self.host["driver"]["version"]

    def uuid(self, index: int) -> str:
        return self.uuids[index]

    def is_mig(self, uuid: str) -> bool:
        return self._gpu("is_mig", uuid)[1]["mig"]

    def virtualization(self, uuid: str) -> str:
        return self._gpu("virtualization", uuid)[1]["virtualization"]

    def fabric(self, uuid: str) -> str:
        self._gpu("fabric", uuid)
        return self.host["fabric"]

    def p2p_status(self, uuid: str, peer: str, what: str) -> bool:
        table = {"read": "p2p", "write": "p2p", "nvlink": "nvlink", "atomics": "atomics"}[what]
        return self.host[table][self._gpu("p2p_status", uuid)[0]][self._gpu("p2p_status", peer)[0]] == "1"

    def _gpu(self, method: str, uuid: str) -> tuple[int, dict]:
        if method in self.host["nvml"].get("lacks", ()):
            raise NotSupported(f"{method} is not in this NVML")
        return next((i, g) for i, g in enumerate(self.host["gpus"]) if g["uuid"] == uuid)


@dataclass
class FakeDriver:
    host: dict
    visible: list[int]

    def start(self) -> int:
        self.version()
        if "start_error" in self.host["driver"]:
            raise RuntimeError(self.host["driver"]["start_error"])
        return len(self.visible)

    def version(self) -> str:
        if "missing" in self.host["driver"]:
            raise RuntimeError(self.host["driver"]["missing"])
        return self.host["driver"]["cuda"]

    def uuid(self, ordinal: int) -> str:
        return self._gpu(ordinal)["uuid"]

    def name(self, ordinal: int) -> str:
        return self._gpu(ordinal)["name"]

    def pci_bus_id(self, ordinal: int) -> str:
        return self._gpu(ordinal)["pci_bus_id"]

    def memory_bytes(self, ordinal: int) -> int:
        return self._gpu(ordinal)["memory_bytes"]

    def attribute(self, ordinal: int, name: str) -> int:
        gpu = self._gpu(ordinal)
        major, minor = gpu["compute_capability"]
        return {
            "compute_capability_major": major,
            "compute_capability_minor": minor,
            "multiprocessor_count": gpu["sm_count"],
            "compute_mode": gpu["compute_mode"],
            "mps_enabled": self.host["mps"],
            "host_register_supported": int(gpu.get("maps_host_memory", True)),
            "can_map_host_memory": 1,
        }[name]

    def p2p_attribute(self, ordinal: int, peer: int, name: str) -> int:
        tables = {
            "access_supported": "p2p",
            "native_atomic_supported": "atomics",
            "performance_rank": "performance_rank",
        }
        return int(self.host[tables[name]][self.visible[ordinal]][self.visible[peer]])

    def _gpu(self, ordinal: int) -> dict:
        return self.host["gpus"][self.visible[ordinal]]


@dataclass
class FakeHost:
    host: dict
    rank: dict

    def boot_id(self) -> str:
        return self.host["boot_id"]

    def hostname(self) -> str:
        return self.host["hostname"]

    def namespace(self, kind: str) -> str:
        return self.rank[f"{kind}_namespace"]

    def shm_bytes(self) -> int:
        return self.host["shm_bytes"]

    def memfd(self) -> bool:
        if self.host.get("memfd", True) is not True:
            raise OSError(self.host["memfd"])
        return True


@dataclass
class FakeSoftware:
    versions: dict

    def python(self) -> str:
        return self.versions["python"]

    def distribution(self, name: str) -> str | None:
        return self.versions[name]

    def triton(self) -> str | None:
        return self.versions["triton"]

    def nvrtc(self) -> str:
        if self.versions["nvrtc"] is None:
            raise RuntimeError("libnvrtc.so was not found")
        return self.versions["nvrtc"]

    def hip(self) -> str | None:
        return self.versions["hip"]

    def current_device(self) -> int:
        return 0


def sources(machine: dict, rank: int) -> Sources:
    """What the process of ``rank`` would find on ``machine``."""
    mine = machine["ranks"][rank]
    host = machine["hosts"][mine["host"]]
    return Sources(FakeNvml(host), FakeDriver(host, mine["visible"]), FakeHost(host, mine), FakeSoftware(machine["software"]))


def look(machine: dict, rank: int, tripwire: Tripwire | None = None) -> Capabilities:
    found = sources(machine, rank)
    return probe(machine["ranks"][rank]["device"], tripwire.around(found) if tripwire else found)


def look_all(machine: dict) -> list[Capabilities]:
    return [look(machine, rank) for rank in range(len(machine["ranks"]))]


@dataclass
class Tripwire:
    """Lets calls through to the sources, notes them in ``calls``, and fails where ``fails(number, call)`` is true."""

    fails: Callable[[int, str], bool]
    error: Exception = field(default_factory=lambda: RuntimeError("tripped"))
    calls: list[str] = field(default_factory=list)

    def around(self, found: Sources) -> Any:
        return Sources(*(_Wired(self, name, getattr(found, name)) for name in ("nvml", "driver", "host", "software")))


class _Wired:
    def __init__(self, wire: Tripwire, name: str, source: Any):  # underscored: sources have methods of such names
        self._wire, self._name, self._source = wire, name, source

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            number, label = len(self._wire.calls), f"{self._name}.{method}"
            self._wire.calls.append(label)
            if self._wire.fails(number, label):
                raise self._wire.error
            return getattr(self._source, method)(*args)

        return call


def record(name: str, caps: list[Capabilities], expect: dict) -> dict:
    """A table from what one process per GPU of a real host saw, all GPUs visible, one rank a GPU in this order."""

    def rows(value: Callable[[Any], object]) -> list[str]:
        links = [[None if a is b else a.link_to(b.gpu.uuid) for b in caps] for a in caps]
        return ["".join("-" if link is None else str(int(value(link) or 0)) for link in row) for row in links]

    first = caps[0]
    versions = {k.replace("_", "-"): v for k, v in first.to_dict()["software"].items()}
    driver, cuda, nvml = (versions.pop(k) for k in ("driver", "cuda-driver", "nvml"))
    modes = {"default": 0, "exclusive-thread": 1, "prohibited": 2, "exclusive-process": 3}
    host = {
        "boot_id": first.host.host_id,
        "hostname": first.host.hostname,
        "shm_bytes": first.host.shm_bytes,
        "driver": {"version": driver, "cuda": cuda},
        "nvml": {"version": nvml} if nvml else {"missing": "not found"},
        "fabric": first.fabric,
        "mps": int(bool(first.mps)),
        "gpus": [{**c.to_dict()["gpu"], "compute_mode": modes.get(c.gpu.compute_mode, 0)} for c in caps],
        "nvlink": rows(lambda link: link.nvlink),
        "p2p": rows(lambda link: link.p2p_access),
        "atomics": rows(lambda link: link.native_atomics),
        "performance_rank": rows(lambda link: link.performance_rank),
    }
    ranks = [
        {
            "host": 0,
            "visible": list(range(len(caps))),
            "device": f"cuda:{i}",
            "pid_namespace": c.host.pid_namespace,
            "ipc_namespace": c.host.ipc_namespace,
        }
        for i, c in enumerate(caps)
    ]
    software = {"allreduce-jit": versions.pop("package"), **versions}
    table = {"name": name, "recorded": True, "note": "", "nnodes": 1, "software": software}
    return json.loads(json.dumps({**table, "hosts": [host], "ranks": ranks, "expect": expect}))
