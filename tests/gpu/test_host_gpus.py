"""Path host on real ranks: 2, 3, 4 and 8 GPUs that meet in pinned host memory, though they could reach each other."""

import gpu_work
import kill_matrix
import pytest

from allreduce_jit.harness import ranks
from allreduce_jit.policy.verdict import Path

WORLDS = [pytest.param(n, marks=pytest.mark.gpus(n), id=f"{n} GPUs") for n in (2, 3, 4, 8)]
ONLY = ((Path.HOST,),)  # the paths of what takes several


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("ALLREDUCE_JIT_PATH", "host")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")  # what this path stands beside


def run(n, *names):
    done = ranks.run(gpu_work.suite, [name if isinstance(name, tuple) else (name, ()) for name in names], gpus=n, deadline=240)
    assert len(done.value) == len(names)


@pytest.mark.parametrize("n", WORLDS)
def test_host_bits(n):
    run(n, ("sizes", (Path.HOST, 1 << 26)), "host_algorithms", ("graphs", (Path.HOST,)), ("gpu_fused:bits", (Path.HOST,)))


@pytest.mark.parametrize("n", WORLDS)
def test_host_tune(n, monkeypatch, tmp_path):
    monkeypatch.setenv("ALLREDUCE_JIT_CACHE_DIR", str(tmp_path))
    run(n, ("tuned_table", ONLY[0]))


@pytest.mark.parametrize("n", WORLDS)
def test_host_calls_that_come_again(n):
    run(n, ("repeated", (Path.HOST,)), ("repeated", (Path.HOST, False, True)), ("gpu_streams:every_form", (Path.HOST,)))


@pytest.mark.parametrize("n", WORLDS)
def test_host_ends_and_new_beginnings(n):
    names = ("aborted", "aborted_by_an_exception", "concurrent", "recovery", "skipped_and_extra_calls", "captures")
    run(n, *((f"gpu_life:{name}", ONLY) for name in names), ("late_peer", ONLY), ("mismatch", ONLY), "nothing_is_left")


@pytest.mark.parametrize("n", WORLDS)
def test_host_without_dependent_launches(n, monkeypatch):
    monkeypatch.setenv("ALLREDUCE_JIT_PDL", "off")
    run(n, "host_algorithms", ("graphs", (Path.HOST,)))


@pytest.mark.parametrize("n", WORLDS)
def test_host_bench_and_soak(n, monkeypatch):
    run(n, "bench", ("soaked", (True,)))
    monkeypatch.setenv("ALLREDUCE_JIT_C_CALLS", "off")
    run(n, "soaked")


@pytest.mark.parametrize("n", WORLDS)
def test_host_kills(n):
    # One at a time: where several spin on the same GPUs in turn, large calls through host memory take seconds.
    found = kill_matrix.matrix(n, 15, 2.0, watcher=True, seed=0)
    assert found["ok"], [row["problems"] for row in found["rows"]] or found
