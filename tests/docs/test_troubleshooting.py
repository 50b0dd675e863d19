"""docs/troubleshooting.md: an entry for every reason code and every exception, and none for what is gone; each quotes its message, which
is provoked here."""

from __future__ import annotations

import inspect
import re
import resource
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT
from helpers.fakes import MACHINES, look_all

import allreduce_jit
from allreduce_jit import errors
from allreduce_jit.describe import reasons
from allreduce_jit.engine.failure import Kind, Signature, abort_code, explain, tag
from allreduce_jit.engine.fallback import TorchEngine
from allreduce_jit.harness import ranks
from allreduce_jit.jit import compiler
from allreduce_jit.jit.cache import KernelCache
from allreduce_jit.machine import toolchain
from allreduce_jit.policy.catalogue import cuda_module, triton_module
from allreduce_jit.policy.dispatch import decide
from allreduce_jit.policy.operation import all_reduce
from allreduce_jit.policy.verdict import CODES
from allreduce_jit.settings import Settings
from allreduce_jit.setup.exchange import missing
from allreduce_jit.setup.nccl import connect as connect_nccl
from allreduce_jit.setup.stages import Stages, StepDown

TEXT = (ROOT / "docs/troubleshooting.md").read_text()
PARTS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M))
CODE_ENTRIES, ERROR_ENTRIES = (
    dict(re.findall(r"^### `(.+?)`\n(.*?)(?=^### |\Z)", PARTS[part], re.S | re.M)) for part in ("Reason codes", "Exceptions")
)
EXCEPTIONS = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
BASES = {"AllReduceError", "CommunicatorFailedError"}


def quotes(entry):
    return [" ".join(line[2:] for line in block.splitlines()) for block in re.findall(r"(?:^> .*\n)+", entry, re.M)]


def fits(quote, message):
    """``…`` in a quote stands for whatever differs from one time to the next."""
    return re.fullmatch(".+?".join(map(re.escape, quote.split("…"))), message, re.S) is not None


def same_words(entry, messages):
    """Each message is quoted, and each quote was provoked. What the probe found is in parentheses at the end, if it found anything."""
    quoted = quotes(entry)
    for message in messages:
        assert any(fits(quote, message) or fits(f"{quote} (…)", message) for quote in quoted), message
    for quote in quoted:
        assert any(fits(quote, message) or fits(f"{quote} (…)", message) for message in messages), quote


# -- which entries there are


def test_every_code_has_an_entry_and_no_other():
    assert list(CODE_ENTRIES) == list(CODES)


def test_every_exception_has_an_entry_and_no_other():
    assert set(ERROR_ENTRIES) == set(EXCEPTIONS) and len(EXCEPTIONS) > 10


@pytest.mark.parametrize(("name", "entry"), [*CODE_ENTRIES.items(), *ERROR_ENTRIES.items()])
def test_entries_say_what_it_means_and_what_to_do(name, entry):
    assert bool(quotes(entry)) != (name in BASES)
    assert len(re.findall(r"^\*\*Means\.\*\* \S", entry, re.M)) == 1 and len(re.findall(r"^\*\*Do\.\*\* \S", entry, re.M)) == 1


def test_headings_elsewhere_are_no_entries():
    assert len(re.findall(r"^### `", TEXT, re.M)) == len(CODE_ENTRIES) + len(ERROR_ENTRIES)


# -- reasons, provoked


def with_part(machine, part, **facts):
    """The machine's ranks, the last of which has other facts."""
    *others, last = look_all(MACHINES[machine])
    return [*others, replace(last, **({part: replace(getattr(last, part), **facts)} if part else facts))]


def told(caps, nnodes=1, **wish):
    verdict = decide(caps, [Settings(**wish)] * len(caps), nnodes=nnodes)
    return {reason.code: reason.text for reason in verdict.reasons}


@pytest.fixture(scope="module")
def alone():
    """The default group, of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def of_stage(group, code, work):
    """The reason of a stage whose work fails."""
    stages = Stages(group, torch.device("cuda", 0), None, 10, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
        with pytest.raises(StepDown) as failed:
            stages._run("build_s", code, work)
    return failed.value.reason.text


def machine(name, **wish):
    return lambda: told(look_all(MACHINES[name]), **wish)


def without(name, part, fact):
    return lambda: told(with_part(name, part, **{fact: None}))


def no_host_memory(value):
    return told(with_part("rtx4090-x2", "gpu", maps_host_memory=value))


PROVOKED = {
    "full-nvlink": [machine("h200-x4")],
    "world-size-1": [lambda: told(look_all(MACHINES["h200-x4"])[:1])],
    "path-forced": [machine("h200-x4", path="legacy"), machine("h200-x4", path="torch")],
    "v2-switched-off": [machine("h200-x4", use_v2=False)],
    "spans-nodes": [machine("h100-two-nodes"), machine("h200-x4", nnodes=2)],
    "cpu": [machine("cpu-ranks")],
    "rocm": [machine("mi300x-x8")],
    "no-driver": [machine("no-driver")],
    "no-gpu": [machine("hidden-gpus"), machine("h100-x8-fabric-unready")],
    "same-gpu": [machine("duplicated-visible-h100"), machine("gh200-two-ranks")],
    "mig": [machine("a100-mig-two-gpus")],
    "vgpu": [machine("a100-vgpu-x2")],
    "pid-namespace": [machine("h100-x2-pid-namespaces"), without("h200-x4", "host", "pid_namespace")],
    "ipc-namespace": [machine("h100-x2-ipc-namespaces"), without("h200-x4", "host", "ipc_namespace")],
    "world-size": [machine("a100-x16")],
    "compute-capability": [machine("dgx1-v100-x8")],
    "mixed-gpus": [machine("mixed-a100-h100")],
    "fabric-not-ready": [machine("h100-x8-fabric-in-progress")],
    "no-nvlink": [machine("l40s-x4"), machine("ray-h100-x4-nvml-missing")],
    "partial-nvlink": [machine("h100-nvl-x4-two-bridges")],
    "no-p2p": [machine("rtx4090-x2"), machine("ray-h100-x4-nvml-missing")],
    "has-p2p": [lambda: told(with_part("a100-pcie-x4", "software", triton=None))],
    "no-host-memory": [partial(no_host_memory, False), partial(no_host_memory, None)],
    "no-shared-memory": [without("rtx4090-x2", "host", "memfd")],
    "no-nvrtc": [without("h200-x4", "software", "nvrtc")],
    "no-triton": [without("l40s-x4", "software", "triton")],
}


def unknown_gpu():
    """A compiler that does not know the GPU."""
    pytest.importorskip("cuda.core", reason="needs cuda-core, which NVRTC is called through")
    try:
        toolchain.nvrtc()
    except Exception as error:
        pytest.skip(f"needs NVRTC: {error}")
    compiler.build(cuda_module("one_shot", 2), "sm_10", KernelCache(None))


def refused_handle():
    """A driver that does not map a peer's memory: what cuda.bindings answers, through our own calls."""
    driver_module, memory = cuda_modules()
    from cuda.bindings import driver

    def refuse(*_):
        return (driver.CUresult.CUDA_ERROR_INVALID_VALUE,)

    staging = memory.StagingMemory.__new__(memory.StagingMemory)
    staging.rank, staging.addresses, staging._local = 0, [], 0
    answers = SimpleNamespace(
        CUresult=driver.CUresult,
        cuGetErrorString=lambda error: (driver.CUresult.CUDA_SUCCESS, b"invalid argument"),
        cuIpcOpenMemHandle=refuse,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver_module, "driver", answers)
        staging.connect(["", "00" * 64])


def wrong_bytes():
    cuda_modules()
    from allreduce_jit.engine.base import KernelEngine

    memory = SimpleNamespace(connect=list, read=lambda rank, nbytes: bytes(nbytes), FILL=0xFF)
    place = SimpleNamespace(world_size=2, rank=0)
    KernelEngine.connect(SimpleNamespace(memory=memory, config=place), ["", ""])


def hidden_proc():
    """A peer's /proc that this rank does not see."""
    cuda_modules()
    from allreduce_jit.engine.host_memory import HostStaging

    staging = HostStaging.__new__(HostStaging)
    staging.rank, staging.nbytes = 0, 4096
    staging._opened(1, 2**22 + 1, 3, 0, 0)  # above the highest PID of Linux


def wrong_sums():
    """A call whose result has a wrong element."""
    from allreduce_jit.engine import verify

    out = torch.zeros(4096)
    engine = SimpleNamespace(config=SimpleNamespace(world_size=2, rank=0))
    verify._compare(engine, out, 0, "a captured call")


def lost_sums():
    """Kernels that leave the output as it was."""
    cuda_modules()
    from allreduce_jit.engine import verify
    from allreduce_jit.engine.base import EngineConfig
    from allreduce_jit.engine.nvlink import NvlinkEngine

    engine = NvlinkEngine(EngineConfig(0, 2, torch.device("cpu"), "sm_90", True, True, Settings()))
    engine.run = lambda spec, plan, x, out: out.zero_()
    engine.prepare = lambda *_, **__: SimpleNamespace(aligned=[[None]])
    engine._graph_cache, engine.check = SimpleNamespace(make=id), int
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        verify._kernels(engine, all_reduce("float32"))


def cuda_modules():
    pytest.importorskip("cuda.bindings.driver")
    from allreduce_jit.engine import driver, memory

    return driver, memory


OF_STAGES = {
    "build-failed": [unknown_gpu],
    "map-failed": [refused_handle, wrong_bytes, hidden_proc],
    "verify-failed": [lost_sums, wrong_sums],
}


def test_every_reason_is_provoked():
    assert {*PROVOKED, *OF_STAGES, "no-nccl"} == set(CODES)


@pytest.mark.parametrize("code", PROVOKED)
def test_reasons_of_machines_and_wishes(code):
    same_words(CODE_ENTRIES[code], [provoke()[code] for provoke in PROVOKED[code]])


@pytest.mark.parametrize("code", OF_STAGES)
def test_reasons_of_stages(alone, code):
    same_words(CODE_ENTRIES[code], [of_stage(alone, code, work) for work in OF_STAGES[code]])


def test_reason_no_nccl(alone, monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    nothing, problem = connect_nccl(alone, torch.device("cpu"), 10)
    ladder = SimpleNamespace(verdict=SimpleNamespace(reasons=()))
    (reason,) = reasons(ladder, SimpleNamespace(problem=problem))
    assert nothing is None and problem == "rank 0: this torch has no NCCL"
    assert reason.code == "no-nccl" and fits(quotes(CODE_ENTRIES["no-nccl"])[0], reason.text)


# -- exceptions, provoked


def stopped(kind, dead=(), **differ):
    mine, theirs = Signature(4096, "bfloat16", "one_shot", False), Signature(8192, "bfloat16", "one_shot", False)
    sides = [(s.numel, tag(s.algorithm, s.dtype)) for s in (mine, theirs)] if kind is Kind.MISMATCH else [(0, 0), (0, 0)]
    words = [0, 7, tag("one_shot", "bfloat16"), 0, 5, 30000, *sides[0], *sides[1]]
    return explain(words, abort_code(kind, 1, 0), 0, [None, None], lambda rank: rank not in dead)


def raised(call, *args, **options):
    with pytest.raises(errors.AllReduceError) as found:
        call(*args, **options)
    return found.value


def not_deterministic(place):
    return str(raised(allreduce_jit.init, device=place.device, deterministic=True))


def too_few_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    return raised(ranks.run, not_deterministic, cpu=2)


def closed(group):
    comm = allreduce_jit.init(group, "cpu")
    comm.close()
    return raised(comm.all_reduce, torch.ones(8))


def test_exceptions_of_arguments_and_settings(alone):
    comm = allreduce_jit.init(alone, "cpu")
    found = [
        raised(Settings.from_env, {"ALLREDUCE_JIT_PATH": "v2"}),
        raised(comm.all_reduce, torch.ones(8, device="meta")),
        raised(comm.all_reduce, [1, 2]),
        closed(alone),
        raised(compiler.build, triton_module("one_shot", 2, "float32", True), "sm_70", KernelCache(None)),
    ]
    comm.close()
    names = ["SettingsError", "InputError", "InputTypeError", "ClosedError", "CompileError"]
    assert [type(error).__name__ for error in found] == names
    for name, error in zip(names, found):
        same_words(ERROR_ENTRIES[name], [str(error)])


def test_exception_of_a_limit(monkeypatch):
    same_words(ERROR_ENTRIES["SetupError"], [str(too_few_files(monkeypatch))])


def test_not_deterministic():
    same_words(ERROR_ENTRIES["NotDeterministicError"], [ranks.run(not_deterministic, cpu=2, deadline=120).value])


def aborted_torch_engine():
    found = []
    TorchEngine.abort(SimpleNamespace(world_size=2, rank=0, _nccl=None, _fail=found.append))
    return found[0]


FAILURES = {
    "PeerTimeoutError": [lambda: stopped(Kind.TIMEOUT), lambda: missing(0, {1: RuntimeError("timed out")}, 300)],
    "PeerLostError": [
        lambda: stopped(Kind.LOST, dead=(1,)),
        lambda: TorchEngine._death(SimpleNamespace(rank=0, dead=[1], _report=lambda *about: {})),
    ],
    "CallMismatchError": [lambda: stopped(Kind.MISMATCH)],
    "ConcurrentUseError": [lambda: stopped(Kind.CONCURRENT)],
    "PoisonedError": [lambda: stopped(Kind.ABORTED), aborted_torch_engine],
}


@pytest.mark.parametrize("name", FAILURES)
def test_exceptions_of_failures(name):
    found = [provoke() for provoke in FAILURES[name]]
    assert {type(error) for error in found} == {EXCEPTIONS[name]}
    same_words(ERROR_ENTRIES[name], list(map(str, found)))


def test_every_exception_is_provoked():
    others = {
        "SettingsError",
        "InputError",
        "InputTypeError",
        "ClosedError",
        "CompileError",
        "SetupError",
        "NotDeterministicError",
    }
    assert {*FAILURES, *others} == set(EXCEPTIONS) - BASES


def test_planted_changes_of_a_message_would_be_noticed():
    with pytest.raises(AssertionError):
        same_words(CODE_ENTRIES["cpu"], ["rank 0 is on the CPU"])
    with pytest.raises(AssertionError):
        same_words(CODE_ENTRIES["spans-nodes"], ["the job has nnodes=2"])  # the other quote was not provoked
