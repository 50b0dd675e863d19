"""``bench --op add-rms-norm`` on CPU ranks: what is timed, what is counted as wrong, which competitors take part."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.fake_communicator import Fake

from allreduce_jit.bench import bench, competitors, fused, fused_competitors, fused_table, norm_calls, timing
from allreduce_jit.bench.competitors import Unavailable
from allreduce_jit.bench.fused_competitors import FlashInferOneShot, FlashInferTwoShot
from allreduce_jit.bench.norm_calls import Given, NormKind
from allreduce_jit.cli import arguments as command_line
from allreduce_jit.cli import main as cli
from allreduce_jit.engine import reference
from allreduce_jit.harness import ranks
from allreduce_jit.policy.norm import QUANTS, ROUNDINGS


class Gloo(competitors.Competitor):
    """In place; refuses 128 elements a row."""

    name = "gloo"

    def __init__(self, place, count, nbytes):
        self.place = place
        self.buffers = self.allocate(count, nbytes)

    def call(self, tensor):
        if tensor.shape[-1] == 128:
            raise Unavailable("not so many")
        dist.all_reduce(tensor)
        return tensor


class Unsummed(Gloo):
    """Right in its trial."""

    name = "unsummed"

    def call(self, tensor):
        return super().call(tensor) if tensor.dim() == 1 else tensor


def of(bug):
    def init(group=None, device=None, operations=()):
        return Fake(device, "v2", bug)

    return init


BENCH = fused.Options((1, 3), (64, 128), 2, 0, "bfloat16", "R", "none", True, "both", ("gloo", "unsummed"), 0)
BUGS = {
    "sum of this rank alone": "none",
    "weight of another row": "none",
    "residual left out": "static",
    "scale of another row": "token",
}


def everything(place):
    timing.BURSTS, timing.CALLS = (), 4
    competitors.COMPETITORS = {kind.name: kind for kind in (Gloo, Unsummed)}
    documents = {"clean": fused.work(place, BENCH, None)}
    small = {**vars(BENCH), "hidden": (128,), "peers": ()}
    for quant in QUANTS[1:]:
        documents[quant] = fused.work(place, fused.Options(**small | {"quant": quant, "dtype": "half", "rounding": "H"}), None)
    for bug, quant in BUGS.items():
        documents[bug] = fused.work(place, fused.Options(**small | {"quant": quant}), of(bug))
    documents["unchecked"] = fused.work(place, fused.Options(**small | {"check": False}), of("sum of this rank alone"))
    return place.gather(documents)


@pytest.fixture(scope="module")
def documents():
    first, second = ranks.run(everything, cpu=2, deadline=200).value
    assert [(name, d["ok"], d["wrong"]) for name, d in first.items()] == [
        (name, d["ok"], d["wrong"]) for name, d in second.items()
    ]
    return first


def test_rows(documents):
    document = documents["clean"]
    assert document["ok"] and document["wrong"] == 0 and document["op"] == "add-rms-norm"
    assert [(row["rows"], row["hidden"]) for row in document["rows"]] == [(1, 64), (3, 64), (1, 128), (3, 128)]
    for row in document["rows"]:
        assert (row["mode"], row["path"], row["algorithm"]) == ("eager", "torch.distributed", "apart")
        assert row["bytes"] == 2 * row["rows"] * row["hidden"] and row["calls"] == 4
        for name in fused.OURS:
            assert 0 < row[name]["p50_us"] <= row[name]["p99_us"]
        assert row["fused"]["wrong"] == row["unfused"]["wrong"] == 0 and row["sol_us"] is row["sol_ratio"] is None
    families = document["communicator"]["operations"]
    assert families == []  # no kernels on the CPU
    assert {"gpus", "driver", "versions"} <= document["machine"].keys()
    json.dumps(document)


def test_competitors(documents):
    """Their all-reduce with our norm behind: timed where it is right, else why not."""
    assert documents["clean"]["peers"] == {"gloo": None, "unsummed": None}
    for row in documents["clean"]["rows"]:
        if row["hidden"] == 64:
            assert row["peers"]["gloo"]["p50_us"] > 0
            assert row["peers"]["unsummed"]["reason"].startswith("rank 0: wrong ")
        else:
            assert row["peers"]["gloo"] == {"reason": "rank 0: not so many"}


def test_quantized(documents):
    for quant in QUANTS[1:]:
        document = documents[quant]
        assert document["ok"] and {(row["quantization"], row["rounding"]) for row in document["rows"]} == {(quant, "H")}


@pytest.mark.parametrize("bug", BUGS)
def test_wrong_elements_are_counted(documents, bug):
    document = documents[bug]
    assert not document["ok"] and document["wrong"] > 0
    assert not sum(row["unfused"]["wrong"] for row in document["rows"])  # which does not have the bug
    wrong = {row["rows"] for row in document["rows"] if row["fused"]["wrong"]}
    assert wrong == ({3} if bug in ("residual left out", "scale of another row") else {1, 3})
    assert "FAILED" in fused_table.render(document)


def test_unchecked(documents):
    document = documents["unchecked"]
    assert document["ok"] and document["rows"][0]["fused"]["wrong"] is None and "N/A" in fused_table.render(document)


def test_table(documents):
    lines = [line.split() for line in fused_table.render(documents["clean"]).splitlines()]
    header = "rows hidden type algorithm fused p99 #wrong unfused allreduce norm gloo unsummed"
    at = lines.index(header.split())
    assert lines[at + 2][:4] == ["1", "64", "bfloat16", "apart"] and lines[at + 4][-2:] == ["-", "-"]
    assert "# - gloo: rank 0: not so many".split() in lines
    assert lines[-1] == ["#", "Out", "of", "bounds", "values", ":", "0", "OK"]
    row = documents["clean"]["rows"][0] | {"sol_us": 2.0, "sol_ratio": 1.25}
    text = fused_table.render(documents["clean"] | {"rows": [row], "floor": {"flag_us": 1, "hop_us": 1, "egress_gbs": 400}})
    assert "SoL  xSoL" in text and "2.00  1.25" in text


def test_shapes_by_device():
    options = fused.Options(**vars(BENCH) | {"rows": None, "hidden": None})
    assert options.shapes(torch.device("cpu")) == [(1, 1024), (8, 1024), (32, 1024)]
    found = options.shapes(torch.device("cuda"))
    assert len(found) == 12 and found[0] == (1, 4096) and found[-1] == (2048, 8192)


def test_command(capfd, tmp_path):
    arguments = "bench --op add-rms-norm --cpu 2 -n 1 -w 0 --rows 1,2 --hidden 64 --quant token --peers none --deadline 100"
    assert cli.main([*arguments.split(), "--json"]) == 0
    saved = tmp_path / "saved.json"
    saved.write_text(capfd.readouterr().out)
    assert [row["rows"] for row in json.loads(saved.read_text())["rows"]] == [1, 2]
    assert cli.main(["bench", "--from", str(saved)]) == 0
    assert "# Out of bounds values : 0 OK" in capfd.readouterr().out
    page = str(tmp_path / "page.html")
    for options in (["--from", str(saved)], ["--op", "add-rms-norm"]):
        assert cli.main(["bench", *options, "--html", page]) == 2
        assert "all-reduces alone" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "why"), [("--hidden 100", "multiple of 8"), ("--hidden 64 --quant group", "multiple of 128")]
)
def test_no_such_norm(options, why, capsys, monkeypatch):
    monkeypatch.setattr(ranks, "_start", None)
    assert cli.main(f"bench --op add-rms-norm {options}".split()) == 2
    assert why in capsys.readouterr().err


# -- the calls, without processes


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_calls_and_what_is_expected_of_them(quant, rounding):
    kind = NormKind("bfloat16", 256, rounding, quant, with_norm=quant != "none", column_major=quant == "group")
    total, given, outs = kind.total(1, 5, "cpu", 4), kind.given(1, 5, "cpu"), kind.outs(5, "cpu")
    assert torch.equal(total, reference.expected(1, 4, 5 * 256, torch.bfloat16).view(5, 256))
    want = kind.expected(total, given)
    assert want.keys() == outs.keys() and norm_calls.wrong(outs, want) > 1000
    named = kind.named(kind.twin(total, given, outs)())
    assert named.keys() == outs.keys() and all(named[name] is outs[name] for name in outs)
    assert norm_calls.wrong(outs, want) == 0 and norm_calls.off(kind, outs, want, given, 4) is None
    outs["out"][3, 100] = -outs["out"][3, 100].float() + 1
    assert norm_calls.wrong(outs, want) == 1
    kind.twin(kind.x(1, 0, 5, "cpu"), given, outs)()
    assert "rounding explains" in norm_calls.off(kind, outs, want, given, 4)


# -- FlashInfer


@pytest.fixture
def flashinfer(monkeypatch):
    """``trtllm_allreduce_fusion`` of 0.7, computing on the CPU with 4 equal ranks."""
    module, calls = ModuleType("flashinfer.comm"), []

    def fusion(allreduce_in, world_size, world_rank, token_num, hidden_dim, workspace_ptrs, launch_with_pdl,
               trigger_completion_at_end, fp32_acc, pattern_code, use_oneshot, allreduce_out, residual_in,
               residual_out, norm_out, quant_out, scale_out, rms_gamma, rms_eps, scale_factor, layout_code,
               metadata=None):  # fmt: skip
        calls.append((pattern_code, token_num, hidden_dim, use_oneshot))
        quant = {1: "none", 2: "static", 10: "token"}[pattern_code]
        kind = NormKind("bfloat16", hidden_dim, quant=quant)
        outs = {"residual_out": residual_out, "out": norm_out if quant == "none" else quant_out}
        outs |= {"scale_out": scale_out} if quant == "token" else {}
        total = (allreduce_in.float() * world_size).to(allreduce_in.dtype)
        kind.twin(total, Given(residual_in, rms_gamma, scale_factor), outs)()

    module.trtllm_create_ipc_workspace_for_all_reduce_fusion = lambda **_: ("handles", "workspace")
    module.trtllm_allreduce_fusion = fusion
    names = {"kAllReduce": 0, "kARResidualRMSNorm": 1, "kARResidualRMSNormFP8Quant": 2, "kARResidualRMSNormDynamicFP8Quant": 10}
    module.AllReduceFusionPattern = SimpleNamespace(**names)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.comm", module)
    return calls


def built(kind):
    one = object.__new__(kind)
    one.place = SimpleNamespace(rank=0, world_size=4, device=torch.device("cpu"))
    one.buffers = one.allocate(1, 1 << 16)
    return one


@pytest.mark.parametrize(("quant", "pattern"), [("none", 1), ("static", 2), ("token", 10)])
@pytest.mark.parametrize("form", [FlashInferOneShot, FlashInferTwoShot])
def test_flashinfer(flashinfer, form, quant, pattern):
    kind, one = NormKind("bfloat16", 128, quant=quant), built(form)
    x, given, outs = kind.x(0, 0, 6, "cpu"), kind.given(0, 6, "cpu"), kind.outs(6, "cpu")
    fused_competitors.call(one, kind, x, given, outs)
    assert flashinfer == [(pattern, 6, 128, form is FlashInferOneShot)]
    assert norm_calls.wrong(outs, kind.expected((x.float() * 4).bfloat16(), given)) == 0


def test_flashinfer_is_not_given_what_it_does_not_take(flashinfer):
    for kind, rows, form, why in (
        (NormKind("bfloat16", 128, quant="group"), 2, FlashInferOneShot, "no pattern"),
        (NormKind("float32", 128), 2, FlashInferOneShot, "fp16 or bf16"),
        (NormKind("bfloat16", 128, residual=False), 2, FlashInferOneShot, "with a residual"),
        (NormKind("bfloat16", 128), 4, FlashInferTwoShot, "more than 4 rows"),
        (NormKind("bfloat16", 16384), 4, FlashInferOneShot, "set up for"),
    ):
        with pytest.raises(Unavailable, match=why):
            fused_competitors.call(
                built(form), kind, kind.x(0, 0, rows, "cpu"), kind.given(0, rows, "cpu"), kind.outs(rows, "cpu")
            )
    assert not flashinfer


def test_names_on_the_command_line():
    assert fused_competitors.names(("nccl", "flashinfer")) == ["nccl", "flashinfer_one_shot", "flashinfer_two_shot"]
    assert set(fused_competitors.names(command_line.COMPETITORS)) == set(fused_competitors.kinds())
    assert bench.fused is fused
