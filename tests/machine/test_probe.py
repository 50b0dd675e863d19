"""The probe on every machine of ``machines/``: the declared verdict, no exception whatever call fails."""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.fakes import MACHINES, FakeDriver, Tripwire, look, look_all, record, sources

import allreduce_jit
from allreduce_jit.errors import InputError
from allreduce_jit.machine import probe as probe_module
from allreduce_jit.machine import sources as probe_sources
from allreduce_jit.machine.probe import Capabilities, both, probe
from allreduce_jit.policy.dispatch import Path as Rung
from allreduce_jit.policy.dispatch import decide
from allreduce_jit.settings import Settings

HEIGHT = {rung: len(Rung) - i for i, rung in enumerate(Rung)}
every_machine = pytest.mark.parametrize("name", MACHINES)


def verdict(machine, caps):
    return decide(caps, [Settings()] * len(caps), nnodes=machine["nnodes"])


def as_declared(machine, caps) -> bool:
    found = verdict(machine, caps)
    expect = machine["expect"]
    codes = [r.code for r in found.reasons]
    return (found.path.value, codes, found.full_nvlink, found.backend) == (
        expect["path"], expect["reasons"], expect["full_nvlink"], expect["backend"]
    )  # fmt: skip


def test_there_are_machines_of_every_outcome():
    assert len(MACHINES) >= 15
    assert {m["expect"]["path"] for m in MACHINES.values()} == {p.value for p in Rung}


@every_machine
def test_declared_verdict(name):
    machine = MACHINES[name]
    caps = look_all(machine)
    assert as_declared(machine, caps), verdict(machine, caps)


@every_machine
def test_json_is_lossless(name):
    for caps in look_all(MACHINES[name]):
        assert Capabilities.from_dict(json.loads(json.dumps(caps.to_dict()))) == caps


@every_machine
def test_a_healthy_machine_has_no_problems(name):
    machine = MACHINES[name]
    if any({"missing", "start_error", "lacks"} & {*h["nvml"], *h["driver"]} for h in machine["hosts"]):
        assert any(c.problems for c in look_all(machine))
    else:
        assert [c.problems for c in look_all(machine)] == [()] * len(machine["ranks"])


def check_never_higher(machine, caps, what):
    found = verdict(machine, caps)
    assert HEIGHT[found.path] <= HEIGHT[Rung(machine["expect"]["path"])], (what, found)
    assert found.reasons


@every_machine
@pytest.mark.parametrize("error", [RuntimeError("tripped"), KeyError("x"), UnicodeDecodeError("utf8", b"", 0, 1, "")])
def test_each_kind_of_call_failing_on_all_ranks(name, error):
    machine = MACHINES[name]
    wire = Tripwire(lambda n, call: False)
    look(machine, 0, wire)
    for broken in dict.fromkeys(wire.calls):
        caps = [look(machine, r, Tripwire(lambda n, call: call == broken, error)) for r in range(len(machine["ranks"]))]
        check_never_higher(machine, caps, broken)
        assert any(p.startswith(broken + "(") for p in caps[0].problems)


@every_machine
def test_each_single_call_failing_on_one_rank(name):
    machine = MACHINES[name]
    healthy = look_all(machine)
    last = len(healthy) - 1
    for rank in {0, last}:
        wire = Tripwire(lambda n, call: False)
        assert look(machine, rank, wire) == healthy[rank]  # the wire alone changes nothing
        for k, call in enumerate(wire.calls):
            caps = list(healthy)
            caps[rank] = look(machine, rank, Tripwire(lambda n, _, k=k: n == k))
            check_never_higher(machine, caps, (rank, k, call))


def test_planted_uncaught_exception_would_be_noticed(monkeypatch):
    def ask(self, source, method, *args):
        return getattr(getattr(self.sources, source), method)(*args)

    monkeypatch.setattr(probe_module._Probe, "ask", ask)
    with pytest.raises(RuntimeError, match="tripped"):
        look(MACHINES["h200-x4"], 0, Tripwire(lambda n, call: call == "driver.attribute"))


def test_planted_identity_by_ordinal_would_be_noticed(monkeypatch):
    """A probe that took ordinals for GPUs misjudges exactly the machines that are there to show it."""
    monkeypatch.setattr(FakeDriver, "uuid", lambda self, i: self.host["gpus"][i]["uuid"])
    for name in ("ray-h100-x4", "a100-pcie-x4-permuted", "a100-pcie-x4-permuted-apart", "duplicated-visible-h100"):
        caps = [replace(c, gpu=replace(c.gpu, pci_bus_id=c.gpu.uuid)) for c in look_all(MACHINES[name])]
        assert not as_declared(MACHINES[name], caps), name


def test_link_facts_and_their_source():
    nvml_and_driver = look(MACHINES["a100-pcie-x4-two-bridges"], 0)
    first, second = nvml_and_driver.links[:2]
    assert (first.nvlink, first.p2p_access, first.native_atomics, first.performance_rank) == (True, True, True, 0)
    assert (second.nvlink, second.p2p_access, second.native_atomics, second.performance_rank) == (False, True, False, 1)
    assert {link.source for link in nvml_and_driver.links} == {"nvml+driver"}
    assert {link.source for link in look(MACHINES["h100-x8-nvml-missing"], 0).links} == {"driver"}
    ray = look(MACHINES["ray-h100-x4"], 2)
    assert [(link.source, link.p2p_access, link.performance_rank) for link in ray.links] == [("nvml", True, None)] * 3
    assert ray.link_to(ray.gpu.uuid) is None


def test_the_driver_overrules_nvml_on_gpus_that_it_sees():
    machine = MACHINES["h100-x4-old-bindings"]
    seen = json.loads(json.dumps({**machine, "hosts": [{**machine["hosts"][0], "nvml": {"version": "13"}}]}))
    wire = Tripwire(lambda n, call: call == "driver.p2p_attribute")
    assert {link.p2p_access for link in look(seen, 0, wire).links} == {None}
    assert {link.nvlink for link in look(seen, 0, wire).links} == {True}


def test_nvml_is_shut_down_once_whatever_happens():
    wire = Tripwire(lambda n, call: call.startswith("driver."))
    look(MACHINES["h200-x4"], 0, wire)
    assert wire.calls.count("nvml.stop") == 1


@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", "cpu"), ("cpu:0", "cpu"), ("cuda", "cuda:0"), ("cuda:3", "cuda:3"), (2, "cuda:2"), ("1", "cuda:1")],
)
def test_devices(device, name):
    assert probe(device, sources(MACHINES["h200-x4"], 0)).device == name


@pytest.mark.parametrize("device", ["", "cuda:", "cuda0", "xpu:0", "cuda:-1", -1, None, "CPU"])
def test_not_a_device(device):
    with pytest.raises(InputError, match="expected cpu"):
        probe(device, sources(MACHINES["h200-x4"], 0))


def test_torch_devices():
    torch = pytest.importorskip("torch")
    assert probe(torch.device("cuda", 1), sources(MACHINES["h200-x4"], 0)).device == "cuda:1"
    assert probe(torch.device("cpu"), sources(MACHINES["h200-x4"], 0)).gpu is None


def test_vgpu_and_mig_are_known_by_name_without_nvml():
    without = Tripwire(lambda n, call: call == "nvml.start")
    assert look(MACHINES["a100-vgpu-x2"], 0, without).gpu.virtualization == "vgpu"
    assert look(MACHINES["a100-mig-two-gpus"], 0, without).gpu.mig is True
    for name in ("gh200-two-ranks", "a100-pcie-x4", "h200-x4", "l40s-x4"):
        assert look(MACHINES[name], 0, without).gpu.virtualization == "unknown"


def test_three_valued_and():
    truth = [both(a, b) for a in (True, False, None) for b in (True, False, None)]
    assert truth == [True, False, None, False, False, False, None, False, None]


def test_a_recording_judges_like_the_machine():
    for name in ("h200-x4", "a100-pcie-x4-two-bridges", "rtx4090-x2"):
        machine = MACHINES[name]
        caps = look_all(machine)
        copy = record(name, caps, machine["expect"])
        assert look_all(copy) == caps
        assert as_declared(copy, look_all(copy))


REAL = """
import json, sys
from allreduce_jit.machine.probe import probe
caps = probe("cuda:0")
assert not {"torch", "triton"} & set(sys.modules), "the probe must not import them"
print(json.dumps(caps.to_dict()))
"""


def test_the_real_machine():
    run = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=True)
    caps = Capabilities.from_dict(json.loads(run.stdout))
    assert caps.host.hostname and caps.host.host_id and caps.software.python
    if caps.gpu is None:
        assert any(p.startswith("driver.") for p in caps.problems)
        found = decide([caps, caps], [Settings()] * 2)
        assert found.path is Rung.TORCH
        assert found.reasons[0].code in ("no-driver", "no-gpu", "rocm")
    else:
        assert re.fullmatch(r"(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", caps.gpu.uuid)
        assert caps.software.cuda_driver and caps.gpu.sm_count > 0
        assert all(link.peer_uuid != caps.gpu.uuid for link in caps.links)


def test_warnings_as_errors_change_nothing():
    """Neither an import of ours nor a look warns."""
    found = pkgutil.walk_packages(allreduce_jit.__path__, "allreduce_jit.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)\n"
    code += "from allreduce_jit.machine.probe import probe\nprint(*probe('cuda:0').problems, sep='\\n')"
    seen = [subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True).stdout
            for options in ([], ["-W", "error"])]  # fmt: skip
    assert len(names) > 30 and seen[0] == seen[1]


def test_the_cpu_asks_for_no_driver():
    caps = probe("cpu")
    assert not [p for p in caps.problems if p.startswith(("driver", "nvml"))]


def test_seam_uses_functions_that_the_bindings_have():
    nvml = pytest.importorskip("cuda.bindings.nvml")
    driver = pytest.importorskip("cuda.bindings.driver")
    text = Path(probe_sources.__file__).read_text()
    for name in set(re.findall(r"nvml\.(\w+)", text)) - {"bindings"}:
        assert hasattr(nvml, name), name
    for name in set(re.findall(r'_ask\("(\w+)"', text)):
        assert hasattr(driver, name), name
    assert [int(i) for i in list(nvml.GpuP2PCapsIndex)[:4]] == list(probe_sources._P2P_INDEX.values())
    assert len(nvml.GpuVirtualizationMode) == len(probe_sources._VIRTUALIZATION)
    assert [s.name.lower() for s in nvml.GpuFabricState] == list(probe_sources._FABRIC)
    for name in ("compute_capability_major", "multiprocessor_count", "compute_mode", "mps_enabled"):
        assert hasattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name.upper()}")
    for name in ("access_supported", "native_atomic_supported", "performance_rank"):
        assert hasattr(driver.CUdevice_P2PAttribute, f"CU_DEVICE_P2P_ATTRIBUTE_{name.upper()}")


class FakeBinding:
    """As much of ``cuda.bindings.driver`` as the seam needs."""

    class CUresult:
        CUDA_SUCCESS = 0

    @staticmethod
    def cuDeviceGet(ordinal):
        return 0, ordinal

    @staticmethod
    def cuDeviceGetName(length, device):
        return 0, (b"NVIDIA A100 MIG 1g.5gb" if device else b"NVIDIA A100").ljust(length, b"\0")

    @staticmethod
    def cuDeviceGetUuid(device):
        return 0, SimpleNamespace(bytes=bytes(range(16)))

    @staticmethod
    def cuDeviceTotalMem(device):
        return SimpleNamespace(name="CUDA_ERROR_UNKNOWN"), 0


def test_driver_source_turns_results_into_values():
    source = probe_sources.DriverSource()
    source._driver = FakeBinding()
    assert source.name(0) == "NVIDIA A100"
    assert source.uuid(0) == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert source.uuid(1).startswith("MIG-0001")
    with pytest.raises(RuntimeError, match="cuDeviceTotalMem: CUDA_ERROR_UNKNOWN"):
        source.memory_bytes(0)


def test_nvml_source_turns_results_into_values():
    class NotSupportedError(Exception):
        pass

    def refuse(handle):
        raise NotSupportedError

    source = probe_sources.NvmlSource()
    source._nvml = SimpleNamespace(
        NotSupportedError=NotSupportedError,
        device_get_handle_by_uuid={"a": 1, "b": 2}.__getitem__,
        device_get_p2p_status=lambda a, b, what: (0, 5, 6, 1)[what],
        device_is_mig_device_handle=lambda handle: 0,
        device_get_mig_mode=lambda handle: (1, 1) if handle == 1 else refuse(handle),
        device_get_virtualization_mode=lambda handle: 2,
        device_get_gpu_fabric_info_v=lambda handle: SimpleNamespace(state=2) if handle == 1 else refuse(handle),
    )
    answers = [source.p2p_status("a", "b", what) for what in ("read", "write", "nvlink", "atomics")]
    assert answers == [True, False, None, False]
    assert (source.is_mig("a"), source.is_mig("b")) == (True, False)
    assert source.virtualization("a") == "vgpu"
    assert (source.fabric("a"), source.fabric("b")) == ("in_progress", "not_supported")
