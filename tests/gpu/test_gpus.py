"""Real ranks on 2, 3, 4 and 8 GPUs: every rung of the ladder, eager and captured, every bit."""

import os

import gpu_work
import kill_matrix
import pytest
from helpers.torchrun import torchrun

from allreduce_jit.harness import ranks
from allreduce_jit.policy.verdict import Path

WORLDS = [pytest.param(n, marks=pytest.mark.gpus(n), id=f"{n} GPUs") for n in (2, 3, 4, 8)]

LIVE_AT_EXIT = """
import os, torch, torch.distributed as dist, allreduce_jit
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("gloo")
comm = allreduce_jit.init()
x, graph = torch.ones(1000, device="cuda"), torch.cuda.CUDAGraph()
with comm.capture(), torch.cuda.graph(graph):
    out = comm.all_reduce(x)
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    graph.replay()
    print(float(out[0]))
"""


def run(n, *names):
    done = ranks.run(gpu_work.suite, [n if isinstance(n, tuple) else (n, ()) for n in names], gpus=n, deadline=240).value
    assert len(done) == len(names)


@pytest.mark.parametrize("n", WORLDS)
def test_v2(n):
    run(n, ("sizes", (Path.V2,)), "algorithms", ("graphs", (Path.V2,)), "bad_input", ("dropin", ("CustomAllReduceV2", False)))


@pytest.mark.parametrize("n", WORLDS)
def test_legacy_by_the_switch(n, monkeypatch):
    monkeypatch.setenv("SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2", "off")
    run(n, ("sizes", (Path.LEGACY, 1 << 26)), ("graphs", (Path.LEGACY,)), ("dropin", ("CustomAllreduce", False)), "legacy_chunks")


@pytest.mark.parametrize("n", WORLDS)
def test_calls_that_come_again(n, monkeypatch):
    run(n, ("repeated", (Path.V2,)), ("repeated", (Path.V2, False, True)))
    monkeypatch.setenv("SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2", "off")
    run(n, ("repeated", (Path.LEGACY,)), ("repeated", (Path.LEGACY, False, True)))
    monkeypatch.setenv("ALLREDUCE_JIT_STAGING_MB", "4")
    run(n, ("repeated", (Path.LEGACY, True)))
    monkeypatch.delenv("SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2")
    run(n, ("repeated", (Path.V2, True)))


@pytest.mark.parametrize("n", WORLDS)
def test_norms(n):
    run(n, *(f"gpu_fused:{name}" for name in ("specials", "forms", "among_all_reduces", "again", "few_blocks", "large", "ends")))


@pytest.mark.parametrize("path", [Path.V2, Path.LEGACY, Path.TORCH], ids=lambda path: path.short)
@pytest.mark.parametrize("n", WORLDS)
def test_bits_of_norms(n, path, monkeypatch):
    if path is Path.TORCH:
        monkeypatch.setenv("ALLREDUCE_JIT_PATH", "torch")
    run(n, ("gpu_fused:bits", (path,)))


@pytest.mark.parametrize("n", WORLDS)
def test_torch_by_the_switch(n, monkeypatch):
    monkeypatch.setenv("ALLREDUCE_JIT_PATH", "torch")
    run(n, ("sizes", (Path.TORCH, 1 << 24)), ("dropin", ("CustomAllreduce", True)))


@pytest.mark.parametrize("n", WORLDS)
def test_ladder(n):
    run(n, "siblings", "without_nvlink", "failures_step_down", "late_peer", "mismatch")


@pytest.mark.parametrize("n", WORLDS)
def test_bench_and_soak(n, monkeypatch):
    run(n, "floor", "missing_flag", "bench", ("soaked", (True,)))
    monkeypatch.setenv("ALLREDUCE_JIT_C_CALLS", "off")
    run(n, "soaked")


@pytest.mark.parametrize("n", WORLDS)
def test_tools_of_norms(n):
    run(n, *(f"gpu_tools:{name}" for name in ("bench", "soaked", "selftested", "decoded")))


@pytest.mark.parametrize("n", WORLDS)
def test_operators_and_install(n):
    run(n, "gpu_install:operators", "gpu_install:installed")


@pytest.mark.parametrize("n", WORLDS)
def test_compiled_decode(n):
    run(n, "gpu_install:decoded")


@pytest.mark.parametrize("n", [WORLDS[0], *WORLDS[2:]])  # that divide the heads
def test_transformers(n):
    for needed in ("transformers", "accelerate"):  # the second is what the first asks for where a model is split
        pytest.importorskip(needed, reason=f"needs {needed}")
    run(n, "gpu_install:transformers")


@pytest.mark.parametrize("n", WORLDS)
def test_plans_are_the_fastest(n, monkeypatch):
    monkeypatch.setenv("ALLREDUCE_JIT_TUNING", "off")  # the package's table, whatever was measured here before
    run(n, "plan_is_fastest")


@pytest.mark.parametrize("n", WORLDS)
def test_tune(n, monkeypatch, tmp_path):
    monkeypatch.setenv("ALLREDUCE_JIT_CACHE_DIR", str(tmp_path))
    run(n, "tuned_table")
    monkeypatch.setenv("SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2", "off")
    run(n, ("tuned_table", (Path.LEGACY,)))


@pytest.mark.parametrize("n", WORLDS)
def test_ends_and_new_beginnings(n):
    names = (
        "aborted",
        "aborted_by_an_exception",
        "concurrent",
        "recovery",
        "skipped_and_extra_calls",
        "number_wraps",
        "captures",
        "group_gone",
        "virtual_memory",
    )
    run(n, *(f"gpu_life:{name}" for name in names))


@pytest.mark.parametrize("n", WORLDS)
def test_cycles(n):
    run(n, ("gpu_life:cycles", (int(os.environ.get("CYCLES", "24")),)))


@pytest.mark.parametrize("n", WORLDS)
def test_few_blocks(n):
    run(n, "few_blocks")


@pytest.mark.parametrize("n", WORLDS)
def test_without_dependent_launches(n, monkeypatch):
    monkeypatch.setenv("ALLREDUCE_JIT_PDL", "off")
    run(n, "algorithms", ("graphs", (Path.V2,)), ("repeated", (Path.V2,)))


@pytest.mark.parametrize("n", WORLDS)
def test_kills(n):
    """A rank killed, stopped or leaving by an exception in every phase; ``.ci/gpu`` does more of them."""
    found = kill_matrix.matrix(n, 15, 2.0, watcher=True, seed=0, jobs=3)
    assert found["ok"], [row["problems"] for row in found["rows"]] or found


@pytest.mark.parametrize("n", WORLDS)
@pytest.mark.parametrize(("path", "in_c"), [(Path.V2, "on"), (Path.V2, "off"), (Path.LEGACY, "on")], ids=str)
def test_streams(n, path, in_c, monkeypatch):
    monkeypatch.setenv("ALLREDUCE_JIT_C_CALLS", in_c)
    run(n, ("gpu_streams:every_form", (path,)))


@pytest.mark.parametrize("n", WORLDS)
def test_users_programs(n):
    names = "without_memory", "allocator_that_sleeps", "damaged_packets", "memory_is_full"
    run(n, *(f"gpu_users:{name}" for name in names))


@pytest.mark.parametrize("n", WORLDS[:2])
@pytest.mark.parametrize("path", ["v2", "legacy", "torch.distributed"])
def test_a_peer_that_dies_in_a_call_of_nccl(n, path, capfd):
    with pytest.raises(
        ranks.RanksFailedError
    ) as caught:  # the survivors leave with exit code 0, once they have said what they saw
        ranks.run(gpu_work.suite, [("gpu_users:nccl_and_a_dead_peer", (path,))], gpus=n, deadline=120)
    assert "SIGKILL" in caught.value.failed[n - 1], caught.value.failed
    said = capfd.readouterr().out
    assert said.count("told") == n - 1 and "BAD" not in said, said


@pytest.mark.gpus(2)
def test_exit_with_a_live_graph_and_after_a_fork(tmp_path):
    assert torchrun(LIVE_AT_EXIT, tmp_path).split() == ["2.0", "2.0"]


@pytest.mark.parametrize("n", WORLDS[2:])
def test_groups(n):
    run(n, "groups")


@pytest.mark.gpus(2)
def test_expandable_segments(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    run(2, ("graphs", (Path.V2,)), "gpu_life:captures")


@pytest.mark.gpus(1)
def test_two_ranks_on_one_gpu(monkeypatch):
    monkeypatch.setattr(ranks, "_devices", lambda gpus, cpu: ["cuda:0", "cuda:0"])
    run(1, "same_gpu")
