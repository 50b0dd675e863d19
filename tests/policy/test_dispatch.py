"""The decision table of the ladder: each situation, each wish of a user, alone and together."""

from __future__ import annotations

import itertools
import logging
import re
from dataclasses import replace

import pytest
from helpers.fakes import MACHINES, look_all
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from allreduce_jit.errors import InputError
from allreduce_jit.policy import checks
from allreduce_jit.policy.dispatch import apply_multi_node_policy, decide
from allreduce_jit.policy.verdict import CODES, Path, Reason, Verdict
from allreduce_jit.settings import PATHS, V2_SWITCH, Settings

AUTO, OFF = Settings(), Settings(use_v2=False)
LEGACY, TORCH = Settings(path="legacy"), Settings(path="torch")
NVLINK = tuple(look_all(MACHINES["h200-x4"]))
PCIE = tuple(look_all(MACHINES["a100-pcie-x4"]))
NO_P2P = tuple(look_all(MACHINES["rtx4090-x2"]))


def judge(caps, settings=AUTO, **kwargs):
    each = [settings] * len(caps) if isinstance(settings, Settings) else settings
    return decide(caps, each, **kwargs)


def codes(verdict: Verdict) -> list[str]:
    return [reason.code for reason in verdict.reasons]


def with_software(caps, rank, **versions):
    return [replace(c, software=replace(c.software, **versions)) if i == rank else c for i, c in enumerate(caps)]


def with_link(caps, rank, peer, **facts):
    target = caps[peer].gpu.uuid
    links = tuple(replace(x, **facts) if x.peer_uuid == target else x for x in caps[rank].links)
    return [replace(c, links=links) if i == rank else c for i, c in enumerate(caps)]


def with_gpu(caps, rank, **facts):
    return [replace(c, gpu=replace(c.gpu, **facts)) if i == rank else c for i, c in enumerate(caps)]


def with_host(caps, rank, **facts):
    return [replace(c, host=replace(c.host, **facts)) if i == rank else c for i, c in enumerate(caps)]


# (machine, wish of all ranks) -> path, codes, full_nvlink
TABLE = [
    (NVLINK, AUTO, Path.V2, ["full-nvlink"], True),
    (NVLINK, OFF, Path.LEGACY, ["v2-switched-off"], True),
    (NVLINK, LEGACY, Path.LEGACY, ["path-forced"], True),
    (NVLINK, TORCH, Path.TORCH, ["path-forced"], None),
    (NVLINK, replace(OFF, path="legacy"), Path.LEGACY, ["v2-switched-off"], True),
    (PCIE, AUTO, Path.LEGACY, ["no-nvlink"], False),
    (PCIE, OFF, Path.LEGACY, ["v2-switched-off"], False),
    (PCIE, LEGACY, Path.LEGACY, ["path-forced"], False),
    (PCIE, TORCH, Path.TORCH, ["path-forced"], None),
]


@pytest.mark.parametrize(("caps", "wish", "path", "expected", "full_nvlink"), TABLE)
@pytest.mark.parametrize("who", [None, 0, 3])
def test_wishes(caps, wish, path, expected, full_nvlink, who):
    """A wish counts the same whether all ranks have it or a single one, which the reason then names."""
    wishes = [wish if who in (None, rank) else AUTO for rank in range(4)]
    found = judge(caps, wishes)
    assert (found.path, codes(found), found.full_nvlink, found.backend) == (path, expected, full_nvlink, "nccl")
    if wish != AUTO and found.reasons[0].code in ("v2-switched-off", "path-forced"):
        assert found.reasons[0].rank == (who or 0)
        assert f"rank {who or 0} " in found.reasons[0].text


def test_v2_off_on_one_rank_and_a_forced_path_on_another():
    found = judge(NVLINK, [AUTO, OFF, TORCH, AUTO])
    assert (found.path, codes(found), found.reasons[0].rank) == (Path.TORCH, ["path-forced"], 2)
    found = judge(NVLINK, [AUTO, LEGACY, OFF, AUTO])
    assert (found.path, codes(found), found.reasons[0].rank) == (Path.LEGACY, ["v2-switched-off"], 2)


@pytest.mark.parametrize("rank", range(4))
def test_missing_compilers(rank):
    no_nvrtc = judge(with_software(NVLINK, rank, nvrtc=None))
    assert (no_nvrtc.path, codes(no_nvrtc), no_nvrtc.full_nvlink) == (Path.LEGACY, ["no-nvrtc"], True)
    assert no_nvrtc.reasons[0].rank == rank
    assert judge(with_software(NVLINK, rank, triton=None)).path is Path.V2
    no_triton = judge(with_software(PCIE, rank, triton=None))
    assert (no_triton.path, codes(no_triton)) == (Path.TORCH, ["no-nvlink", "no-triton", "has-p2p"])
    assert no_triton.reasons[1].rank == rank
    assert judge(with_software(PCIE, rank, nvrtc=None)).path is Path.LEGACY
    neither = judge(with_software(NVLINK, rank, nvrtc=None, triton=None))
    assert (neither.path, codes(neither), neither.full_nvlink) == (Path.TORCH, ["no-nvrtc", "no-triton", "has-p2p"], None)
    assert neither.backend == "nccl"
    off = judge(with_software(NVLINK, rank, triton=None), OFF)
    assert (off.path, codes(off)) == (Path.TORCH, ["v2-switched-off", "no-triton", "has-p2p"])
    apart = judge(with_software(NO_P2P, min(rank, 1), nvrtc=None))
    assert (apart.path, codes(apart)) == (Path.TORCH, ["no-nvlink", "no-p2p", "no-nvrtc"])
    assert judge(with_software(NO_P2P, min(rank, 1), triton=None)).path is Path.HOST


@pytest.mark.parametrize(("rank", "peer"), list(itertools.permutations(range(4), 2)))
@pytest.mark.parametrize("value", [False, None])
def test_one_direction_of_one_pair_is_enough_to_step_down(rank, peer, value):
    found = judge(with_link(NVLINK, rank, peer, nvlink=value))
    assert (found.path, codes(found), found.full_nvlink) == (Path.LEGACY, ["partial-nvlink"], False)
    assert found.reasons[0].rank == rank and f"rank {peer}" in found.reasons[0].text
    found = judge(with_link(NVLINK, rank, peer, p2p_access=value))
    assert (found.path, codes(found), found.full_nvlink) == (Path.HOST, ["no-p2p"], True)
    found = judge(with_link(PCIE, rank, peer, p2p_access=value))
    assert (found.path, codes(found)) == (Path.HOST, ["no-nvlink", "no-p2p"])


def test_planted_one_directional_check_would_be_noticed(monkeypatch):
    monkeypatch.setattr(checks, "permutations", itertools.combinations)
    assert judge(with_link(NVLINK, 3, 0, nvlink=False)).path is Path.V2


def test_planted_optimism_about_the_unknown_would_be_noticed(monkeypatch):
    monkeypatch.setattr(checks, "_lacking", lambda group, fact: [])
    for name in ("ray-h100-x4-nvml-missing", "l40s-x4-vm", "rtx3090-x4-two-bridges"):
        found = judge(look_all(MACHINES[name]))
        assert found.path.value != MACHINES[name]["expect"]["path"]


def test_a_link_that_nobody_knows_of():
    caps = [replace(c, links=()) for c in NVLINK]
    found = judge(caps)
    assert (found.path, codes(found)) == (Path.HOST, ["no-nvlink", "no-p2p"])
    assert "cannot tell" in found.reasons[1].text


@pytest.mark.parametrize("rank", [0, 1])
def test_what_host_memory_needs(rank):
    """Each refusal is a reason, with the rank; what is not known is not assumed."""
    assert judge(NO_P2P).path is Path.HOST
    for value, words in ((False, "cannot map host memory"), (None, "cannot tell whether NVIDIA GeForce RTX 4090 can map")):
        found = judge(with_gpu(NO_P2P, rank, maps_host_memory=value))
        assert (found.path, codes(found)) == (Path.TORCH, ["no-nvlink", "no-p2p", "no-host-memory"])
        assert found.reasons[2].rank == rank and words in found.reasons[2].text
    for value in (False, None):
        caps = [replace(c, host=replace(c.host, memfd=value)) if i == rank else c for i, c in enumerate(NO_P2P)]
        found = judge([replace(c, problems=("host.memfd(): OSError: no",)) for c in caps])
        assert (found.path, codes(found)) == (Path.TORCH, ["no-nvlink", "no-p2p", "no-shared-memory"])
        assert found.reasons[2] == Reason(
            "no-shared-memory", f"rank {rank} cannot make memory to share (memfd_create) (host.memfd(): OSError: no)", rank
        )


def test_host_memory_is_for_gpus_that_cannot_reach_each_other_or_for_who_asks_for_it():
    broken = {Path.V2: Reason("verify-failed", "rank 1: wrong", 1)}
    built = {Path.V2: Reason("build-failed", "rank 1: no", 1), Path.LEGACY: Reason("build-failed", "rank 1: no", 1)}
    for caps in (NVLINK, PCIE):
        found = decide(caps, [AUTO] * 4, left=built)
        assert found.path is Path.TORCH and found.reasons[-1] == Reason("has-p2p", CODES["has-p2p"])
        assert decide(caps, [AUTO] * 4, left={**built, **broken}).path is Path.HOST
        for code in CODES:  # of no other step is it said that a way on which GPUs reach each other is unwanted, or failed
            left = dict.fromkeys((Path.V2, Path.LEGACY), Reason(code, "rank 1: this", 1))
            taken = decide(caps, [AUTO] * 4, left=left).path
            assert taken is (Path.HOST if code in ("path-forced", "map-failed", "verify-failed") else Path.TORCH), code
        assert decide(caps, [AUTO, Settings(path="host"), AUTO, AUTO]).path is Path.HOST
        assert decide(caps, [AUTO, Settings(path="host"), AUTO, Settings(path="torch")]).path is Path.TORCH


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_what_rules_out_all_kernels(rank):
    cases = {
        "mig": with_gpu(NVLINK, rank, mig=True),
        "compute-capability": with_gpu(NVLINK, rank, compute_capability=(7, 5)),
        "rocm": with_software(NVLINK, rank, hip="6.4"),
        "no-gpu": [replace(c, gpu=None) if i == rank else c for i, c in enumerate(NVLINK)],
    }
    for kind in ("vgpu", "host-vgpu", "host-vsga"):
        assert codes(judge(with_gpu(NVLINK, rank, virtualization=kind))) == ["vgpu"]
    for code, caps in cases.items():
        found = judge(caps)
        assert (found.path, codes(found), found.full_nvlink, found.backend) == (Path.TORCH, [code], None, "nccl")
        assert found.reasons[0].rank == rank
    for kind in ("none", "passthrough", "unknown"):
        assert judge(with_gpu(NVLINK, rank, virtualization=kind)).path is Path.V2


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("value", ["4026539999", None])
def test_namespaces(rank, value):
    for kind in ("pid", "ipc"):
        found = judge(with_host(NVLINK, rank, **{f"{kind}_namespace": value}))
        assert (found.path, codes(found)) == (Path.TORCH, [f"{kind}-namespace"])
    unknown = [replace(c, host=replace(c.host, pid_namespace=None)) for c in NVLINK]
    assert codes(judge(unknown)) == ["pid-namespace"] and judge(unknown).reasons[0].text == "rank 0 cannot tell its PID namespace"


def test_hosts_and_nodes():
    assert codes(judge(with_host(NVLINK, 2, host_id="another"))) == ["spans-nodes"]
    found = judge(NVLINK, OFF, nnodes=2)  # as apply_multi_node_policy leaves it: the cause is the nodes
    assert (found.path, codes(found), found.backend) == (Path.TORCH, ["spans-nodes"], "nccl")
    assert "nnodes=2" in found.reasons[0].text


def as_hosts(caps, *host_ids):
    return [replace(c, host=replace(c.host, host_id=host_id)) for c, host_id in zip(caps, host_ids, strict=True)]


def test_hosts_that_cannot_be_known_are_not_one():
    """Equal host names prove nothing, nor do two boot ids that nobody could read."""
    for ids, rank in (((None, None), 0), (("a", None), 1), ((None, "a"), 0), (("a", "b"), 1)):
        apart = with_gpu(as_hosts(NVLINK[:2], *ids), 1, pci_bus_id=NVLINK[0].gpu.pci_bus_id)
        found = judge(apart)
        assert (found.path, codes(found), found.backend) == (Path.TORCH, ["spans-nodes"], "nccl")
        assert found.reasons[0].rank == rank
    why = "host.boot_id(): PermissionError: no"
    found = judge([replace(c, problems=(why,)) for c in as_hosts(NVLINK[:2], None, None)])
    assert found.reasons[0].text == f"rank 0 cannot tell its host ({why})"


def test_only_slices_of_a_gpu_are_the_same_by_its_bus():
    bus = {"pci_bus_id": NVLINK[0].gpu.pci_bus_id}
    assert judge(with_gpu(NVLINK[:2], 1, **bus)).path is Path.V2  # as two GPUs of a virtual machine may well say
    slices = [replace(c, gpu=replace(c.gpu, mig=True, **bus)) for c in NVLINK[:2]]
    assert (codes(judge(slices)), judge(slices).backend) == (["same-gpu"], "gloo")
    assert judge(as_hosts(slices, "a", "b")).backend == "nccl"
    one_is_none = with_gpu(slices, 1, mig=False)
    assert (codes(judge(one_is_none)), judge(one_is_none).backend) == (["mig"], "nccl")


def unknown(c, fact):
    """As if the probe had not found ``fact`` out."""
    part, _, name = fact.partition(".")
    if part == "links":
        return replace(c, links=tuple(replace(link, **{name: None}) for link in c.links))
    return replace(c, **{part: replace(getattr(c, part), **{name: None}) if name else None})


UNKNOWN = ["host.host_id", "host.pid_namespace", "host.ipc_namespace", "host.shm_bytes", "gpu", "fabric", "mps", "links.nvlink",
           "links.p2p_access", "links.native_atomics", "links.performance_rank", "software.package", "software.torch",
           "software.triton", "software.nvrtc", "software.cuda_core", "software.cuda_driver", "software.driver", "software.nvml"]  # fmt: skip


LACKS = ("spans-nodes", "no-gpu", "no-driver", "no-triton", "no-nvrtc")


@pytest.mark.parametrize("machine", ["h200-x4", "a100-pcie-x4", "a100-pcie-x4-two-bridges"])
@pytest.mark.parametrize("fact", UNKNOWN)
def test_what_is_unknown_is_a_sentence_about_that_rank(machine, fact):
    caps = look_all(MACHINES[machine])
    for who in ([0], [2], [3], [1, 3], [0, 1, 2, 3]):
        for also in ((), ("host.ipc_namespace",), ("software.cuda_driver",), ("software.triton",)):
            some = [c if rank not in who else unknown(c, fact) for rank, c in enumerate(caps)]
            for more in also:
                some = [c if rank not in who else unknown(c, more) for rank, c in enumerate(some)]
            for wish in (AUTO, OFF, LEGACY):
                for reason in judge(some, wish).reasons:
                    about = [int(rank) for rank in re.findall(r"rank (\d)", reason.text)]
                    words = reason.text.replace(V2_SWITCH, "").replace("ALLREDUCE_JIT_PATH", "")
                    assert not re.search("None|unknown|_", words), reason
                    assert about == list(dict.fromkeys(about)), reason  # of no rank twice
                    if reason.rank is None:
                        assert not about or reason.code == "no-nvlink"
                    else:
                        assert reason.text.startswith(f"rank {reason.rank} ") and about[0] == reason.rank
                    if reason.code.endswith("-namespace") or reason.code in LACKS:
                        assert reason.rank == who[0], reason


def test_other_texts_are_sentences():
    assert judge(with_gpu(NVLINK, 2, compute_capability=(8, 0))).reasons[0].text == (
        "rank 2 has compute capability 8.0, rank 0 has 9.0"
    )
    down = judge([replace(c, fabric="in_progress") for c in NVLINK]).reasons[0]
    assert down.text == "rank 0 has an NVSwitch fabric that is still being set up"
    assert judge(with_link(NVLINK, 1, 2, nvlink=None)).reasons[0].text.startswith("rank 1 is not known to have NVLink to rank 2")
    assert judge(with_link(NVLINK, 1, 2, nvlink=False)).reasons[0].text.startswith("rank 1 has no NVLink to rank 2")
    why = "software.triton(): OSError: no"
    broken = [replace(c, problems=(why,)) for c in with_software(PCIE, 1, triton=None)]
    assert judge(broken).reasons[1].text == f"rank 1 has no Triton ({why})"


def without(caps, rank, **software):
    """As of a rank without a GPU, and with other facts of its software."""
    return [replace(c, gpu=None) if i == rank else c for i, c in enumerate(with_software(caps, rank, **software))]


# What a group is, the code, and the sentence about rank 1 (or the group): a reason tells what is the matter, with what the probe noted.
SENTENCES = [
    (with_gpu(NVLINK, 1, mig=True), "mig", "rank 1 runs on a MIG instance (NVIDIA H200)"),
    (with_gpu(NVLINK, 1, virtualization="vgpu"), "vgpu", "rank 1 runs on a virtual GPU (NVIDIA H200)"),
    (with_gpu(NVLINK, 1, compute_capability=(7, 5)), "compute-capability", "rank 1 has a GPU older than sm_80 (NVIDIA H200)"),
    (with_gpu(NVLINK, 1, compute_capability=(8, 0)), "mixed-gpus", "rank 1 has compute capability 8.0, rank 0 has 9.0"),
    (with_gpu(NVLINK, 0, compute_capability=(8, 0)), "mixed-gpus", "rank 1 has compute capability 9.0, rank 0 has 8.0"),
    (with_host(NVLINK, 1, pid_namespace="7"), "pid-namespace", f"rank 1 has PID namespace 7, rank 0 has {NVLINK[0].host.pid_namespace}"),
    (with_host(NVLINK, 1, pid_namespace=None), "pid-namespace", "rank 1 cannot tell its PID namespace (host.namespace(pid): no)"),
    (with_host(NVLINK, 1, ipc_namespace=None), "ipc-namespace", "rank 1 cannot tell its IPC namespace (host.namespace(ipc): no)"),
    (with_host(NVLINK, 1, host_id=None), "spans-nodes", "rank 1 cannot tell its host (host.boot_id(): no)"),
    (without(NVLINK, 1), "no-gpu", f"rank 1 has no {NVLINK[1].device} (driver.cuInit(): no)"),
    (without(NVLINK, 1, cuda_driver=None), "no-driver", "rank 1 has no CUDA driver (driver.cuInit(): no)"),
    (without(NVLINK, 1, cuda_driver=None, hip="6.4"), "rocm", "rank 1 has a torch built for ROCm"),
    (with_link(PCIE, 1, 3, p2p_access=False), "no-p2p", "rank 1 has no peer access to the GPU of rank 3"),
    (with_link(PCIE, 1, 3, p2p_access=None), "no-p2p", "rank 1 cannot tell whether it reaches the GPU of rank 3 (nvml.links(): no)"),
    (with_software(PCIE, 1, triton=None), "no-triton", "rank 1 has no Triton (software.triton(): no)"),
    (with_software(NVLINK, 1, nvrtc=None), "no-nvrtc", "rank 1 has no NVRTC (software.nvrtc(): no)"),
]  # fmt: skip
NOTES = ("host.boot_id(): no", "host.namespace(pid): no", "host.namespace(ipc): no", "driver.cuInit(): no", "nvml.links(): no",
         "software.triton(): no", "software.nvrtc(): no", "host.memfd(): no")  # fmt: skip


@pytest.mark.parametrize(("caps", "code", "text"), SENTENCES, ids=[case[1] for case in SENTENCES])
def test_a_reason_is_a_sentence_with_what_was_noted_about_that_and_about_nothing_else(caps, code, text):
    for notes in itertools.permutations(NOTES, 2):
        wanted = re.search(r" \((.*: no)\)$", text)
        told = text if not wanted or wanted[1] in notes else text.removesuffix(wanted[0])
        found = judge([replace(c, problems=notes) for c in caps])
        assert [reason for reason in found.reasons if reason.code == code] == [Reason(code, told, 1)], found


def test_groups_of_a_size_without_kernels_are_told_which_there_are():
    caps = look_all(MACHINES["a100-x16"])
    assert judge(caps[:1]).reasons == (Reason("world-size-1", CODES["world-size-1"], 0),)
    assert judge(caps[:9]).reasons == (Reason("world-size", "9 ranks; there are kernels for 2, 3, 4, 5, 6, 7, 8"),)
    assert judge(caps[:3], supported_world_sizes=(4, 2)).reasons == (Reason("world-size", "3 ranks; there are kernels for 2, 4"),)


def test_of_several_paths_that_are_wanted_the_lowest_counts():
    """And the first rank that wants it is named."""
    host = Settings(path="host")
    for wishes, rank, path in (
        ([LEGACY, host, AUTO, host], 1, "host"),
        ([AUTO, host, LEGACY, AUTO], 1, "host"),
        ([AUTO, LEGACY, AUTO, LEGACY], 1, "legacy"),
        ([host, LEGACY, TORCH, TORCH], 2, "torch"),
    ):
        found = judge(NVLINK, wishes)
        assert found.path.short == path
        assert found.reasons[0] == Reason("path-forced", f"rank {rank} has ALLREDUCE_JIT_PATH={path}", rank)


@pytest.mark.parametrize("size", range(1, 10))
def test_world_sizes(size):
    caps = look_all(MACHINES["a100-x16"])[:size]
    found = judge(caps)
    if size == 1:
        assert (found.path, codes(found), found.backend) == (Path.TORCH, ["world-size-1"], "nccl")
    elif size <= 8:
        assert (found.path, found.full_nvlink) == (Path.V2, True)
    else:
        assert (found.path, codes(found)) == (Path.TORCH, ["world-size"])
    narrow = judge(caps, supported_world_sizes={2: 0, 4: 0}.keys())
    assert (narrow.path is Path.V2) == (size in (2, 4))


def test_arguments_that_are_no_group():
    with pytest.raises(InputError, match="one Capabilities and one Settings a rank, got 0 and 0"):
        decide([], [])
    with pytest.raises(InputError, match="one Capabilities and one Settings a rank, got 4 and 1"):
        decide(NVLINK, [AUTO])
    with pytest.raises(InputError, match="empty"):
        decide(NVLINK, [AUTO] * 4, supported_world_sizes={})


def test_gloo_where_nccl_cannot():
    shared = [NVLINK[0], NVLINK[0]]
    assert (judge(shared).backend, codes(judge(shared))) == ("gloo", ["same-gpu"])
    assert judge(shared, TORCH).backend == "gloo"  # whatever the first reason is
    assert judge(shared).reasons == (Reason("same-gpu", f"rank 1 uses the GPU of rank 0 ({NVLINK[0].gpu.uuid})", 1),)
    later = judge([replace(NVLINK[2], gpu=None), NVLINK[1], NVLINK[1]])  # nor where a rank before them has none
    assert (later.backend, codes(later)) == ("gloo", ["no-gpu"])
    cpu = [replace(NVLINK[0], device="cpu", gpu=None)]
    assert (judge(cpu).backend, judge(cpu * 2).backend, judge([*cpu, NVLINK[1]]).backend) == ("gloo",) * 3
    away = with_host(shared, 1, host_id="another")
    other = with_gpu(away, 1, uuid="GPU-other")  # the same bus id on another host is another GPU
    assert (codes(judge(other)), judge(other).backend) == (["spans-nodes"], "nccl")


@pytest.mark.parametrize(
    ("state", "path"), [("not_started", Path.LEGACY), ("in_progress", Path.LEGACY), ("completed", Path.V2),
                        ("not_supported", Path.V2), (None, Path.V2)]
)  # fmt: skip
def test_fabric(state, path):
    found = judge([replace(NVLINK[0], fabric=state), *NVLINK[1:]])
    assert found.path is path
    assert (codes(found) == ["fabric-not-ready"]) == (path is Path.LEGACY)


everyone = st.sampled_from(sorted(name for name in MACHINES if len(MACHINES[name]["ranks"]) <= 8))
wish = st.sampled_from([AUTO, AUTO, AUTO, OFF, LEGACY, Settings(path="host"), TORCH])


@hypothesis_settings(max_examples=150, deadline=None)
@given(name=everyone, data=st.data())
def test_rank_order_does_not_change_the_verdict(name, data):
    caps = look_all(MACHINES[name])
    wishes = data.draw(st.lists(wish, min_size=len(caps), max_size=len(caps)))
    order = data.draw(st.permutations(range(len(caps))))
    found = decide(caps, wishes)
    again = decide([caps[i] for i in order], [wishes[i] for i in order])
    assert (found.path, found.full_nvlink, found.backend, codes(found)) == (
        again.path, again.full_nvlink, again.backend, codes(again)
    )  # fmt: skip


@hypothesis_settings(max_examples=100, deadline=None)
@given(name=everyone, data=st.data())
def test_the_gathered_copy_decides_like_the_original(name, data):
    """Each rank decides on what came through the exchange, not on its own value."""
    caps = look_all(MACHINES[name])
    wishes = data.draw(st.lists(wish, min_size=len(caps), max_size=len(caps)))
    copy = [type(c).from_dict(c.to_dict()) for c in caps]
    assert decide(copy, wishes) == decide(caps, wishes)


@hypothesis_settings(max_examples=150, deadline=None)
@given(data=st.data(), name=everyone)
def test_a_more_cautious_wish_never_climbs(name, data):
    caps = look_all(MACHINES[name])
    wishes = data.draw(st.lists(wish, min_size=len(caps), max_size=len(caps)))
    extra, rank = data.draw(wish), data.draw(st.integers(0, len(caps) - 1))
    lower = list(wishes)
    path = min(wishes[rank].path, extra.path, key=[*reversed(PATHS)].index)
    lower[rank] = Settings(use_v2=wishes[rank].use_v2 and extra.use_v2, path=path)
    height = [*reversed(Path)].index
    found = decide(caps, lower).path
    # Who names host memory gets it, also where it would be left out because NCCL has a better way.
    asked = found is Path.HOST and "host" in [one.path for one in lower]
    assert asked or height(found) <= height(decide(caps, wishes).path)


def test_values():
    assert str(Path.TORCH) == f"{Path.TORCH}" == "torch.distributed" and Path("v2") is Path.V2
    with pytest.raises(ValueError, match="unknown reason code 'because'; valid: full-nvlink, world-size-1, path-forced, "):
        Reason("because", "of this")
    seen = {code for m in MACHINES.values() for code in m["expect"]["reasons"]}
    assert seen <= set(CODES)
    assert all(code == code.lower() and " " not in code for code in CODES)


WARNING = "Disabling SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2 because nnodes=2 (custom all-reduce v2 is intra-node only)."


@pytest.mark.parametrize(
    ("nnodes", "value", "after", "warns"),
    [
        (1, None, None, False),
        (1, "1", "1", False),
        (1, "nonsense", "nonsense", False),
        (2, None, "0", False),
        (2, "1", "0", True),
        (2, "TRUE", "0", True),
        (2, "0", "0", False),
        (2, "Off", "0", False),
        (2, "n", "0", False),
        (2, "y", "0", True),
    ],
)
def test_multi_node_policy(nnodes, value, after, warns, caplog):
    env = {} if value is None else {V2_SWITCH: value}
    with caplog.at_level(logging.DEBUG, logger="allreduce_jit"):
        apply_multi_node_policy(nnodes, env)
    assert env.get(V2_SWITCH) == after
    messages = [(r.name, r.levelname, r.getMessage()) for r in caplog.records]
    assert messages == ([("allreduce_jit", "WARNING", WARNING)] if warns else [])


def test_multi_node_policy_is_idempotent(monkeypatch, caplog):
    monkeypatch.setenv(V2_SWITCH, "yes")
    apply_multi_node_policy(2)
    apply_multi_node_policy(2)
    assert len(caplog.records) == 1
    assert Settings.from_env().use_v2 is False


@pytest.mark.parametrize("value", ["", "maybe"])
def test_multi_node_policy_reads_a_switch_that_is_not_understood_as_on(value, caplog):
    env = {V2_SWITCH: value}
    apply_multi_node_policy(2, env)
    assert env == {V2_SWITCH: "0"} and caplog.messages[-1] == WARNING
