"""Tools around calls with a norm, on real GPUs: benchmark, soak, selftest and decode step, short."""

import decode_step

from allreduce_jit.bench import competitors, fused, fused_competitors, fused_table
from allreduce_jit.cli import norm_bursts, norm_checks, selftest, soak


def bench(place):
    """Rows beside their floor and every peer that is here; bits of what the graphs left."""
    names = tuple(competitors.COMPETITORS)
    options = fused.Options((1, 33), (2880, 4096), 4, 1, "bfloat16", "R", "none", True, "both", names, 0)
    document = fused.work(place, options, None)
    assert document["ok"] and document["peers"]["nccl"] is None, document["peers"]
    assert document["peers"].keys() == set(fused_competitors.kinds())
    assert [row["mode"] for row in document["rows"]] == ["graph"] * 4 + ["eager"] * 4
    for row in document["rows"]:
        assert row["fused"]["p50_us"] > 0.8 * row["sol_us"] and row["peers"]["nccl"]["p50_us"] > row["sol_us"], row
    assert "xSoL" in fused_table.render(document)
    for quant in ("static", "token", "group"):
        options = fused.Options((8,), (4096,), 4, 1, "half", "H", quant, True, "graph", (), 1)
        assert fused.work(place, options, None)["ok"]


def soaked(place):
    options = soak.Options(1, None, None, seed=0, gemm=True, nccl=False, stalls=True, op="both")
    ledger = soak.work(place, options, None)
    assert ledger["ok"] and ledger["calls"]["graph"] > 0, ledger
    titles = {str(kind) for kind in norm_bursts.kinds(place)}
    assert titles <= {kind.partition(" ")[2] for kind in ledger["kinds"]}, ledger["kinds"]


def selftested(place):
    document = selftest.work(place, selftest.Options(max_bytes=1 << 20, seed=1), None)
    assert document["ok"], document["failures"][:9]
    assert {row["dtype"] for row in document["norms"]} == set(map(str, norm_checks.KINDS))


def decoded(place):
    options = decode_step.Options((1, 9), 3, 1024, 24, 24, 1536, 16, 1, 3, ("nccl", "torch_two_shot"))
    document = decode_step.work(place, options)
    assert document["ok"], document["batches"]
    for row in document["batches"]:
        assert {"triton", "torch", "unfused", "fused", "nccl"} <= row["us"].keys(), row
