"""The command line against a stand-in communicator that sums over gloo."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT
from helpers.fake_communicator import Fake
from helpers.schemas import violations

from allreduce_jit.bench import bench, competitors, table, timing
from allreduce_jit.cli import arguments, doctor, norm_checks, selftest, warmup
from allreduce_jit.cli import main as cli
from allreduce_jit.errors import CompileError
from allreduce_jit.harness import ranks, report
from allreduce_jit.integrations.present import EngineReport
from allreduce_jit.policy.norm import QUANTS, ROUNDINGS
from allreduce_jit.policy.operation import DTYPES
from allreduce_jit.policy.verdict import Reason
from allreduce_jit.settings import V2_SWITCH


def gloo(group=None, device=None):
    return Fake(device)


def kernels(group=None, device=None):
    return Fake(device, "v2")


def wrong_element(group=None, device=None):
    return Fake(device, "v2", "wrong element")


def reverse_order(group=None, device=None):
    return Fake(device, "v2", "reverse order")


def write_past_the_end(group=None, device=None):
    return Fake(device, "torch.distributed", "write past the end")


def input_spoilt(group=None, device=None):
    return Fake(device, "torch.distributed", "input spoilt")


def plans_differ(group=None, device=None):
    return Fake(device, "torch.distributed", "plans differ")


def norm_of_own_sum(group=None, device=None):
    return Fake(device, "torch.distributed", "sum of this rank alone")


def residual_left_out(group=None, device=None):
    return Fake(device, "v2", "residual left out")


def wrong_weight(group=None, device=None):
    return Fake(device, "v2", "weight of another row")


def norm_input_spoilt(group=None, device=None):
    return Fake(device, "v2", "norm's input spoilt")


class Good(competitors.Competitor):
    """In place over gloo; refuses more than 2048 bytes."""

    name = "good"

    def __init__(self, place, count, nbytes):
        self.place = place
        self.buffers = self.allocate(count, nbytes)

    def call(self, tensor):
        if tensor.nbytes == 4096:
            raise RuntimeError("too much for me\nand more")
        dist.all_reduce(tensor)
        return tensor


class Half(Good):
    name = "half"

    def __init__(self, place, count, nbytes):
        if place.rank == 1:
            raise competitors.Unavailable("not on rank 1")
        super().__init__(place, count, nbytes)


class Liar(Good):
    name = "liar"

    def call(self, tensor):
        return tensor.add_(1)


SMALL = selftest.Options(max_bytes=4096, seed=3)


class Breaking(Good):
    """Right in its trial, wrong by a little too much at the sizes that follow."""

    name = "breaking"

    def call(self, tensor):
        dist.all_reduce(tensor)
        return tensor if tensor.numel() > 4096 else tensor + 1


class Absent(Good):
    name = "absent"
    modules = ("no_such_package.shares_buffers_with",)


def few_blocks(device, max_ctas):
    assert max_ctas == 4
    return kernels(device=device)


FAULTS = (wrong_element, reverse_order, write_past_the_end, input_spoilt, plans_differ)
NAMES = ("good", "half", "liar", "breaking", "absent")
BENCH = bench.Options(1024, 4096, 2, 2, 1, "bfloat16", True, "both", NAMES, 0)
NORM_FAULTS = (norm_of_own_sum, residual_left_out, wrong_weight, norm_input_spoilt)
FAKES = {fake.__name__: fake for fake in (gloo, kernels, *FAULTS, *NORM_FAULTS)}


def everything(place):
    """All that needs three ranks, in one set of processes: they cost seconds each."""
    timing.BURSTS, timing.CALLS = (), 2
    competitors.COMPETITORS = {kind.name: kind for kind in (Good, Half, Liar, Breaking, Absent)}
    documents = {name: selftest.work(place, SMALL, init) for name, init in FAKES.items()}
    documents["bench"] = bench.work(place, BENCH, kernels)
    documents["bench reverse_order"] = bench.work(place, replaced(max_bytes=1024, peers=(), dtype="float"), reverse_order)
    documents["bench unchecked"] = bench.work(place, replaced(max_bytes=1024, peers=(), check=False), reverse_order)
    return place.gather(documents)


def replaced(**changes):
    return bench.Options(**{**vars(BENCH), **changes})


@pytest.fixture(scope="module")
def documents():
    every_rank = ranks.run(everything, cpu=3, deadline=200).value
    verdicts = [{name: (d["ok"], d["wrong"]) for name, d in documents.items()} for documents in every_rank]
    assert verdicts == verdicts[:1] * 3
    return every_rank[0]


class TestSelftest:
    def test_right_sums_pass(self, documents):
        for name in ("gloo", "kernels"):
            document = documents[name]
            assert (document["ok"], document["wrong"], document["failures"]) == (True, 0, []), name
            assert document["checked"] == sum(row["checked"] for row in document["rows"] + document["norms"])
            assert sum(row["checked"] for row in document["rows"]) > 100_000
            assert sum(row["checked"] for row in document["norms"]) > 1_000_000

    def test_rows_cover_sizes_and_dtypes(self, documents):
        rows = documents["kernels"]["rows"]
        assert {row["dtype"] for row in rows} == {"fp32", "fp16", "bf16"}
        assert {row["numel"] for row in rows if row["dtype"] == "bf16"} >= {0, 1, 2, 3, 7, 17, 1021, 512, 2048}
        # An algorithm ends at 4096 bytes, so both of its sides are there.
        assert {row["bytes"] for row in rows} >= {4092, 4096}
        assert max(row["bytes"] for row in rows) <= 4096

    def test_each_way_of_calling_is_counted(self, documents):
        rows = [r for r in documents["kernels"]["rows"] if r["size"] == "17 el" and r["dtype"] == "fp16"]
        # Per rank: random and special values; out of place, new tensor, input, in place, two guarded views.
        assert rows[0]["checked"] == 3 * 2 * (4 * 17 + 2 * 19)

    def test_only_kernels_are_held_to_the_ordered_sum(self, documents):
        assert {row["data"] for row in documents["gloo"]["rows"]} == {"integers"}
        assert {row["data"] for row in documents["kernels"]["rows"]} == {"random"}
        assert "its rows used integers, whose sums are exact" in selftest.render(documents["gloo"])
        assert "integers" not in selftest.render(documents["kernels"])

    def test_one_wrong_element_on_one_rank_fails_the_run(self, documents):
        document = documents["wrong_element"]
        assert not document["ok"] and document["wrong"] > 0
        assert {row["numel"] for row in document["rows"] if row["wrong"]} == {1021}
        assert all(f.startswith("rank 1: 1021 el") for f in document["failures"])
        assert any("1 wrong; element 1000 is 0x" in f for f in document["failures"])

    def test_another_order_of_summation_is_wrong(self, documents):
        assert not documents["reverse_order"]["ok"]
        assert any(" fp32 random " in f for f in documents["reverse_order"]["failures"])

    def test_writing_outside_the_output_is_seen(self, documents):
        failures = documents["write_past_the_end"]["failures"]
        assert failures and all("misaligned" in failure for failure in failures)

    def test_a_spoilt_input_is_seen(self, documents):
        assert any("input kept: 1 wrong; element 0" in f for f in documents["input_spoilt"]["failures"])

    def test_ranks_that_plan_differently_fail_though_sums_are_right(self, documents):
        document = documents["plans_differ"]
        assert document["wrong"] == 0 and not document["ok"]
        assert any("rank 2: 17 el fp32: planned" in failure for failure in document["failures"])

    def test_norms_cover_dtypes_roundings_and_quantizations(self, documents):
        rows = documents["kernels"]["norms"]
        kinds = [kind for kind in norm_checks.KINDS if str(kind) in {row["dtype"] for row in rows}]
        assert kinds == list(norm_checks.KINDS)
        assert {kind.dtype for kind in kinds} == set(DTYPES) and {kind.rounding for kind in kinds} == set(ROUNDINGS)
        assert {kind.quant for kind in kinds} == set(QUANTS)
        assert {row["rows"] for row in rows} == {0, 1, 3}  # what 4 KB hold
        assert all(row["checked"] > 0 for row in rows if row["rows"])

    @pytest.mark.parametrize("fault", NORM_FAULTS, ids=lambda fault: fault.__name__)
    def test_wrong_norms_fail_the_run(self, documents, fault):
        document = documents[fault.__name__]
        assert not document["ok"] and not sum(row["wrong"] for row in document["rows"])
        wrong = {(row["rows"], row["dtype"]) for row in document["norms"] if row["wrong"]}
        if fault is residual_left_out:
            assert wrong == {(3, "bf16 64 R")}
        else:
            assert {kind for _, kind in wrong} == set(map(str, norm_checks.KINDS)) and 0 not in {rows for rows, _ in wrong}
        told = {"norm_input_spoilt": "inputs kept: x: 1 wrong", "residual_left_out": "residual_out: "}
        assert any(told.get(fault.__name__, "new tensors: out: ") in failure for failure in document["failures"])
        if fault is wrong_weight:
            assert all(failure.startswith("rank 1: ") for failure in document["failures"])

    def test_document_names_machine_and_reasons(self, documents):
        machine = documents["gloo"]["machine"]
        assert {"gpus", "gpu_count", "driver", "versions"} <= machine.keys()
        assert {"python", "torch", "triton", "cuda-core", "allreduce-jit"} <= machine["versions"].keys()
        assert documents["gloo"]["communicator"]["reasons"][0]["code"] == "cpu"
        json.dumps(documents)

    def test_text_has_one_row_per_size(self, documents):
        text = selftest.render(documents["kernels"])
        lines = [line.split() for line in text.splitlines()]
        headers = ["size", "dtypes", "path", "algorithm", "checked", "#wrong", "eager", "µs"]
        assert headers in lines  # nothing can be captured here
        row = documents["kernels"]["rows"][0] | {"graph_us": 1.5}
        text = selftest.render(documents["kernels"] | {"rows": [row]})
        assert [*headers, "graph", "µs"] in [line.split() for line in text.splitlines()]
        row = next(line for line in lines if line[:2] == ["17", "el"])
        assert row[2:7] == ["fp32", "fp16", "bf16", "v2", "fake"] and row[8] == "0"
        assert "cpu: rank 0 has its tensors on the CPU\n" in text
        norm = next(line for line in lines if line[:3] == ["bf16", "64", "R"])
        assert norm[3:] == ["0", "1", "3", "v2", "fake", norm[-2], "0"]
        assert lines[-1][0] == "PASSED:"
        assert "FAILED: " in selftest.render(documents["wrong_element"])


class TestBench:
    def test_rows(self, documents):
        rows = documents["bench"]["rows"]
        assert [row["bytes"] for row in rows] == [1024, 2048, 4096]
        assert {row["mode"] for row in rows} == {"eager"}
        for row in rows:
            assert row["count"] * 2 == row["bytes"] and row["wrong"] == 0
            assert 0 < row["p50_us"] <= row["p99_us"] and row["calls"] == 2
            assert row["algbw_gbs"] == pytest.approx(row["bytes"] / row["p50_us"] / 1000)
            assert row["busbw_gbs"] == pytest.approx(row["algbw_gbs"] * 4 / 3)
        busbw = [row["busbw_gbs"] for row in rows]
        assert documents["bench"]["average_busbw_gbs"] == pytest.approx(sum(busbw) / 3)

    def test_competitors_are_used_only_if_all_ranks_have_them_and_they_sum_right(self, documents):
        peers = documents["bench"]["peers"]
        assert peers["good"] is None
        assert peers["half"] == "rank 1: not on rank 1"
        assert peers["liar"].startswith("rank 0: wrong sums in a trial call")
        assert peers["absent"] == "rank 0: no_such_package is not installed"

    def test_a_peer_that_sums_wrong_at_one_size_is_not_timed_there(self, documents):
        assert documents["bench"]["peers"]["breaking"] is None
        for row in documents["bench"]["rows"]:
            assert row["peers"]["breaking"]["reason"].startswith("rank 0: wrong sums: off by up to")

    def test_no_floor_without_gpus(self, documents):
        assert documents["bench"]["floor"] == {"reason": "the ranks are on the CPU"}
        assert {(row["sol_us"], row["sol_ratio"]) for row in documents["bench"]["rows"]} == {(None, None)}
        assert "# no SoL: the ranks are on the CPU" in table.render(documents["bench"]).splitlines()

    def test_eager_rows_time_a_given_output_too(self, documents):
        """And both ways with ever new addresses."""
        for row in documents["bench"]["rows"]:
            for field in ("with_out", "ever_new", "ever_new_with_out"):
                assert 0 < row[field]["p50_us"] <= row[field]["p99_us"]
        assert "# *: no two calls of a burst with the same addresses" in table.render(documents["bench"])

    def test_no_two_calls_of_a_burst_have_the_same_addresses(self):
        seen = []

        def all_reduce(x, out=None):
            seen.append((x.data_ptr(), None if out is None else out.data_ptr()))

        one = SimpleNamespace(place=SimpleNamespace(device=torch.device("cpu")), dtype=torch.bfloat16,
                              communicator=SimpleNamespace(all_reduce=all_reduce))  # fmt: skip
        new, with_out = bench._Bench._ever_new(one, [torch.ones(700, dtype=torch.bfloat16)] * 4).values()
        new.burst()
        assert len(set(seen)) == new.calls == timing.CALLS and len({x % 512 for x, _ in seen}) == 1
        seen.clear()
        with_out.burst()
        first, seen = seen[:], seen.clear() or seen
        with_out.burst()  # in step with the inputs
        assert len(set(first)) == len({out for _, out in first}) == with_out.calls and seen == first

    def test_everybody_gets_bursts_of_one_length(self):
        """Short messages in long bursts; always whole rounds of the inputs."""
        loads = [
            timing.Workload(None, [torch.empty(1 << shift, dtype=torch.uint8, device="meta")], []) for shift in range(10, 28)
        ]
        calls = [load.calls for load in loads]
        assert calls == sorted(calls, reverse=True) and calls[0] == 200 and calls[-1] == 8
        assert not [n for n in calls if n % timing.ROTATE]
        on_the_cpu = timing.Workload(None, [torch.empty(1 << 10, dtype=torch.uint8)], [])
        assert on_the_cpu.calls == 8  # with 200 of gloo's, of milliseconds each, bench would not end within its deadline

    def test_turns_share_all_bursts_out(self):
        for iters, least in ((1, 0), (2, 1), (20, 5), (7, 3)):
            turns = list(bench._Bench._turns(SimpleNamespace(options=replaced(iters=iters, warmup=least))))
            assert sum(timed for timed, _ in turns) == iters and all(timed > 0 for timed, _ in turns)
            assert sum(warm for _, warm in turns) >= least

    def test_a_peer_may_refuse_one_size(self, documents):
        cells = [row["peers"]["good"] for row in documents["bench"]["rows"]]
        assert all(cell["p50_us"] > 0 for cell in cells[:2])
        assert cells[2] == {"reason": "rank 0: RuntimeError: too much for me"}

    def test_table(self, documents):
        lines = [line.split() for line in table.render(documents["bench"]).splitlines()]
        header = next(line for line in lines if line[0:1] == ["size"])
        expected = "size count type redop algorithm time p99 algbw busbw #wrong out= time* out=* good p99 breaking p99"
        assert header == expected.split()
        row = lines[lines.index(header) + 4]
        assert row[:5] == ["4096", "2048", "bfloat16", "sum", "fake"] and row[-8] == "0" and row[-4:] == ["-"] * 4
        assert ["#", "Out", "of", "bounds", "values", ":", "0", "OK"] in lines
        assert lines[-1][:6] == ["#", "Avg", "bus", "bandwidth", ":", lines[-1][5]]
        assert "# competitor half: unavailable: rank 1: not on rank 1".split() in lines

    def test_wrong_sums_are_counted_and_can_be_left_unchecked(self, documents):
        assert not documents["bench reverse_order"]["ok"] and documents["bench reverse_order"]["wrong"] > 0
        assert "FAILED" in table.render(documents["bench reverse_order"])
        unchecked = documents["bench unchecked"]
        assert unchecked["ok"] and unchecked["rows"][0]["wrong"] is None
        assert "N/A" in table.render(unchecked)

    def test_sizes(self):
        cpu = torch.device("cpu")
        assert replaced(min_bytes=8, max_bytes=100, factor=3).sizes(cpu) == [8, 24, 72]
        assert replaced(min_bytes=1, max_bytes=5, factor=2).sizes(cpu) == [2, 4]
        assert replaced(min_bytes=1 << 19, max_bytes=None).sizes(cpu) == [1 << 19, 1 << 20]
        assert replaced(min_bytes=1 << 26, max_bytes=None).sizes(torch.device("cuda")) == [1 << 26]

    def test_the_command_line_knows_the_competitors(self):
        assert arguments.COMPETITORS == tuple(competitors.COMPETITORS)


class TestExitCodes:
    def test_wrong_element_is_1_and_json_is_one_document(self, capfd):
        arguments = ["selftest", "--cpu", "2", "--max-bytes", "4092", "--json", "--deadline", "100"]
        assert cli.main(arguments, init=wrong_element) == 1
        document = json.loads(capfd.readouterr().out)
        assert document["ok"] is False and document["wrong"] > 0

    def test_a_good_bench_is_0(self, capfd):
        arguments = "bench --cpu 2 -b 1K -e 1K -n 1 -w 0 -d fp16 --peers nccl,torch_two_shot --deadline 100"
        assert cli.main(arguments.split(), init=kernels) == 0
        out = capfd.readouterr().out
        assert "# competitor nccl: unavailable: rank 0: " in out and "# competitor torch_two_shot: unavailable" in out
        assert "# Out of bounds values : 0 OK" in out

    def test_few_blocks_are_asked_for(self, capfd):
        arguments = "bench --cpu 2 -b 1K -e 1K -n 1 -w 0 --peers none --deadline 100 --max-ctas 4"
        assert cli.main(arguments.split(), init=few_blocks) == 0
        assert "# Out of bounds values : 0 OK" in capfd.readouterr().out

    def test_a_page_of_a_run_and_of_what_it_printed(self, capfd, tmp_path):
        pages = [tmp_path / "now.html", tmp_path / "later.html"]
        arguments = f"bench --cpu 2 -b 1K -e 2K -n 1 -w 0 --peers none --deadline 100 --json --html {pages[0]}"
        assert cli.main(arguments.split(), init=kernels) == 0
        saved = tmp_path / "saved.json"
        saved.write_text(capfd.readouterr().out)
        assert cli.main(["bench", "--from", str(saved), "--html", str(pages[1])]) == 0
        assert capfd.readouterr().out == ""
        assert pages[0].read_text() == pages[1].read_text()
        assert cli.main(["bench", "--from", str(saved)]) == 0
        assert "# Out of bounds values : 0 OK" in capfd.readouterr().out

    @pytest.mark.parametrize("text", ["", "{}", "[1]", '{"rows": []}'])
    def test_what_is_no_document(self, text, tmp_path, capsys):
        file = tmp_path / "saved.json"
        file.write_text(text)
        assert cli.main(["bench", "--from", str(file)]) == 2
        assert str(file) in capsys.readouterr().err

    def test_failing_ranks_are_1_with_the_story_on_stderr(self, capfd, monkeypatch):
        def fail(*_, **__):
            raise ranks.RanksFailedError("rank 3 did not finish within 1 s; all ranks were stopped", {}, [3])

        monkeypatch.setattr(ranks, "run", fail)
        assert cli.main(["selftest", "--json"]) == 1
        out, err = capfd.readouterr()
        assert json.loads(out) == {"ok": False, "error": "rank 3 did not finish within 1 s; all ranks were stopped"}
        assert err == "allreduce-jit selftest: rank 3 did not finish within 1 s; all ranks were stopped\n"

    def test_interruption_is_130(self, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(ranks, "run", interrupt)
        assert cli.main(["bench"]) == 130

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["selftest", "--max-bytes", "lots"],
            ["selftest", "--gpus", "0"],
            ["selftest", "--gpus", "2", "--cpu", "2"],
            ["bench", "-f", "1"],
            ["bench", "-d", "int8"],
            ["bench", "-o", "max"],
            ["bench", "--peers", "nccl,mpi"],
            ["bench", "--max-ctas", "1"],
            ["bench", "--op", "add-rms-norm", "--rows", "0"],
            ["bench", "--op", "add-rms-norm", "--hidden", "4096,17000"],
            ["bench", "--op", "add-rms-norm", "--quant", "fp4"],
            ["soak", "--op", "norm"],
            ["bench", "--graph", "--eager"],
            ["warmup", "--world-size", "9"],
            ["warmup", "--arch", "hopper"],
            ["cache", "shrink"],
            *(["selftest", "--deadline", text] for text in ("nan", "inf", "-1", "0", "1e300", "soon", "")),
            *(["tune", "--deadline", text] for text in ("nan", "-inf")),
            *(["soak", "--seconds", text] for text in ("nan", "inf", "-1", "0", "1e7")),
            *(["soak", "--calls", text] for text in ("0", "-1", "1.5", "²", "1" * 5000)),
            *([command, "--max-bytes", text] for command in ("selftest", "soak") for text in ("0", "3", "9" * 400)),
            *(["selftest", "--cpu", text] for text in ("0", "17", "100000", "two")),
            *(["bench", option, "0"] for option in ("-b", "-e", "-n", "-f")),
            ["bench", "-b", "9999999G"],
            ["bench", "--html", "/nonexistent/page.html"],
            ["bench", "--html", "/"],
        ],
        ids=lambda arguments: " ".join(arguments)[:40],
    )
    def test_bad_usage_is_2(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert "usage: allreduce-jit" in capsys.readouterr().err

    def test_last_size_before_the_first_is_an_error(self, capsys):
        assert cli.main(["bench", "-b", "1M", "-e", "1K"]) == 2
        assert "smaller than the first" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("variables", "named"),
        [
            ({"RANK": "0"}, "RANK is set, but not LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
            ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK='x'"),
            ({"ALLREDUCE_JIT_PATH": "fastest"}, "ALLREDUCE_JIT_PATH='fastest'"),
            ({"ALLREDUCE_JIT_PTAH": "legacy"}, "ALLREDUCE_JIT_PTAH"),
        ],
    )
    @pytest.mark.parametrize("command", ["selftest", "soak", "bench", "tune"])
    def test_a_bad_variable_is_2_and_named_before_a_rank_is_started(self, command, variables, named, monkeypatch, capsys):
        monkeypatch.setattr(ranks, "_start", None)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert cli.main([command]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"allreduce-jit {command}: ") and named in error and error.count("\n") == 1

    def test_a_page_that_cannot_be_written_costs_no_figures(self, documents, monkeypatch, capsys, tmp_path):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        saved = tmp_path / "saved.json"
        saved.write_text(json.dumps(documents["bench"]))
        monkeypatch.setattr(Path, "write_text", full)
        assert cli.main(["bench", "--from", str(saved), "--json", "--html", str(tmp_path / "page.html")]) == 1
        out, err = capsys.readouterr()
        assert json.loads(out) == json.loads(saved.read_text())
        assert err == f"allreduce-jit bench: cannot write {tmp_path / 'page.html'}: No space left on device\n"


def test_help_needs_no_torch():
    program = (
        "import sys, contextlib\nfrom allreduce_jit.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['bench', '--help'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and "--peers" in done.stdout


class TestStreams:
    """Standard streams that cannot carry everything, are full, closed, or read no more."""

    ASCII = {"PYTHONIOENCODING": "ascii"}
    C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    COMMAND = (sys.executable, "-m", "allreduce_jit")

    def run(self, arguments, **options):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", **options.pop("env", {})}
        return subprocess.run([*self.COMMAND, *arguments], env=env, cwd="/", timeout=100, **options)

    @pytest.mark.parametrize(
        ("arguments", "env", "expected"),
        [
            ("selftest --cpu 1 --max-bytes 4", ASCII, "eager us"),
            ("bench --cpu 1 -b 64 -e 64 -n 1 -w 0 --peers none --html {page}", C, "us per call"),
            ("soak --cpu 1 --calls 1 --max-bytes 64", C, "median "),
            ("doctor", ASCII, "would run"),
        ],
        ids=["selftest", "bench", "soak", "doctor"],
    )
    def test_ascii(self, arguments, env, expected, tmp_path):
        page = tmp_path / "page.html"
        arguments = arguments.format(page=page).split()
        done = self.run(arguments, env={**env, "ALLREDUCE_JIT_CACHE_DIR": str(tmp_path)}, capture_output=True)
        out, err = done.stdout.decode("ascii"), done.stderr.decode("ascii")
        assert done.returncode == 0, err
        assert expected in out and "\\xb5" not in out
        assert not page.exists() or "µs" in page.read_text(encoding="utf-8")

    @pytest.mark.parametrize("command", ["", "selftest", "soak", "doctor", "bench", "tune", "warmup", "cache"])
    def test_help_in_ascii(self, command):
        done = self.run([*command.split(), "--help"], env=self.ASCII, capture_output=True)
        assert done.returncode == 0 and done.stdout.decode("ascii").startswith("usage: allreduce-jit"), done.stderr

    @pytest.mark.parametrize("directory", [b"/nowhere/caf\xc3\xa9", b"/nowhere/\xff"])
    def test_names_of_files_stay_what_they_are(self, directory):
        env = {**self.C, "ALLREDUCE_JIT_CACHE_DIR": os.fsdecode(directory)}
        for stream in ({}, self.ASCII):
            done = self.run(["cache", "path"], env={**env, **stream}, capture_output=True)
            assert done.stdout.splitlines()[0] == directory, done.stderr

    def test_closed_streams_are_not_taken_for_each_other(self):
        """Whatever goes to a stream that is closed must not end up in another one, nor in a rank's pipe."""
        command = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", *self.COMMAND, "cache", "path", "--json"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "ALLREDUCE_JIT_PATH": "fastest"}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, timeout=100)
        assert done.returncode == 2 and json.loads(done.stdout)["ok"] is False
        program = (
            "from allreduce_jit.harness.report import prepare_streams as p; p(); import os; print(os.open('/', os.O_RDONLY))"
        )
        command = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", sys.executable, "-c", program]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, timeout=100)
        assert int(done.stdout) > 2

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_a_full_disk_is_told(self):
        with open("/dev/full", "w") as full:
            done = self.run(["cache", "list"], stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (1, b"allreduce-jit: [Errno 28] No space left on device\n")

    def test_a_reader_that_has_gone_is_nothing_to_tell(self):
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = self.run(["cache", "list"], stdout=writer, stderr=subprocess.PIPE)
        finally:
            os.close(writer)
        assert (done.returncode, done.stderr) == (1, b"")


class TestReport:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("8", 8),
            ("1K", 1024),
            ("1kb", 1024),
            ("2KiB", 2048),
            ("1.5K", 1536),
            ("128M", 128 << 20),
            ("1G", 1 << 30),
            ("900719925474099", 900719925474099),
        ],
    )
    def test_sizes(self, text, size):
        assert report.parse_size(text) == size
        assert report.parse_size(report.format_size(size)) == size

    @pytest.mark.parametrize("text", ["", "K", "-1", "1T", "0.3", "1 2", "1e3", "0x10", "9" * 400, "1048577G"])
    def test_what_is_no_size(self, text):
        with pytest.raises(ValueError, match="is no size"):
            report.parse_size(text)

    def test_table_aligns_numbers_right_and_words_left(self):
        lines = report.table(("name", "n"), [("a", 5), ("bcdefg", 123.456), ("c", None)]).splitlines()
        assert lines == ["name         n", "------  ------", "a            5", "bcdefg  123.46", "c            -"]

    def test_versions_are_of_what_is_imported(self):
        """The metapackage cuda-python is not; documents from when it was listed are read all the same."""
        assert "cuda-python" not in report.versions()
        saved = json.loads((ROOT / "docs/benchmarks/2026-11-22-4xH200.json").read_text(encoding="utf-8"))
        machine = saved["machine"]
        assert "cuda-python" in machine["versions"]
        assert "cuda-bindings 13.3.1" in report.headline(machine) and "cuda-python" not in report.headline(machine)

    def test_triton_of_a_pytorch_build_is_triton(self, monkeypatch):
        def version(name):
            if name == "triton":
                raise report.metadata.PackageNotFoundError
            return f"1 {name}"

        monkeypatch.setattr(report.metadata, "version", version)
        assert report.versions()["triton"] == "1 pytorch-triton"

    def test_driver_version(self, tmp_path):
        file = tmp_path / "version"
        file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release\nGCC 13.3.0\n")
        assert report.driver_version(file) == "580.159.04"
        assert report.driver_version(tmp_path / "missing") is None


@dataclass
class Caps:
    device: str
    gpu: dict | None
    problems: tuple = ()

    def to_dict(self):
        return {"device": self.device, "gpu": self.gpu, "links": [], "problems": list(self.problems)}


class TestDoctor:
    def examine(self, path="v2", gpus=4, code="full-nvlink", cache_problem=None, **others):
        def probe(device):
            return Caps(device, None if device == "cpu" else {"uuid": f"GPU-{device}"})

        def decide(caps, settings):
            self.caps = caps
            assert len(caps) == len(settings)
            reason = Reason(code, "because of rank 1", 1)
            return SimpleNamespace(path=SimpleNamespace(value=path), reasons=[reason], full_nvlink=path == "v2", backend="nccl")

        def open_cache(directory):
            return SimpleNamespace(entries=lambda: [("a", 10), ("b", 5)], problem=cache_problem)

        parts = {
            "probe": probe,
            "decide": decide,
            "open_cache": open_cache,
            "gpu_count": gpus,
            "load_tables": lambda *_: {},
            **others,
        }
        return doctor.examine(**{"proc_gpus": Path("/nonexistent"), **parts})

    @pytest.mark.parametrize("path", ["v2", "legacy"])
    def test_a_kernel_path_is_0_whatever_else(self, path):
        document = self.examine(path, cache_problem="read-only")
        assert document.verdict.path == path and document.simulated_ranks == 4
        assert doctor.exit_code(document) == 0
        assert "read-only" in document.problems[0]
        assert f"would run    {path}, else torch.distributed over nccl, for 4 ranks" in doctor.render(document)

    @pytest.mark.parametrize(("path", "gpus", "note"), [
        ("v2", 4, None), ("legacy", 4, "note         from which sizes on calls are two-shot, and go to NCCL, is an estimate on PCIe"),
        ("host", 4, "note         which algorithm runs which size is an estimate for 4 ranks"), ("host", 2, None),
    ])  # fmt: skip
    def test_estimates_are_told_until_something_was_measured(self, path, gpus, note, monkeypatch):
        """With what to do about it; a table that tune kept is named, unless it is not used."""
        asked = []

        def load(cache_dir, caps, ranks):
            asked.append((caps.device, ranks))
            return {path: {"path": "/cache/table.json"}}

        text = doctor.render(self.examine(path, gpus))
        assert "table        package" in text and text.count("estimate") == (note is not None)
        assert note is None or (note in text and "allreduce-jit tune measures it here" in " ".join(text.split()))
        found = self.examine(path, gpus, load_tables=load)
        assert found.verdict.tuning == "/cache/table.json" and asked == [("cuda:0", gpus)]
        assert "table        /cache/table.json" in doctor.render(found) and "estimate" not in doctor.render(found)
        other = self.examine(path, gpus, load_tables=lambda *_: {"another": {"path": "/f"}})
        monkeypatch.setenv("ALLREDUCE_JIT_TUNING", "off")
        off = self.examine(path, gpus, load_tables=load)
        assert off.verdict.tuning == other.verdict.tuning == "package" and len(asked) == 1

    def test_a_path_without_tables_has_none(self):
        found = self.examine("torch.distributed", code="no-p2p")
        assert found.verdict.tuning is None and "table  " not in doctor.render(found)

    def test_what_it_finds_of_gpus_keeps_to_the_schema(self):
        """But for the probe, of which the stand-in has not all."""
        found = self.examine(), self.examine("legacy"), self.examine("torch.distributed", code="no-p2p")
        for document in found:
            engine = EngineReport("vLLM", "1", False, "off", ())
            document = replace(document, probe=(), engines=(engine,)).to_dict()
            assert violations("doctor", json.loads(json.dumps(document))) == []
            assert violations("doctor", document | {"engines": [engine.to_dict() | {"why": 1}]})

    def test_gpus_that_cannot_run_the_kernels_are_1_with_the_reason(self):
        document = self.examine("torch.distributed", code="no-p2p")
        assert doctor.exit_code(document) == 1
        assert document.problems == ("no-p2p: because of rank 1",)
        assert "PROBLEM      no-p2p: because of rank 1" in doctor.render(document)

    def test_the_users_own_choice_is_no_problem(self):
        assert doctor.exit_code(self.examine("torch.distributed", code="path-forced")) == 0

    def test_no_gpu_is_0(self):
        document = self.examine("torch.distributed", gpus=0, code="cpu")
        assert doctor.exit_code(document) == 0 and not document.gpu_present
        assert len(self.caps) == 2 and document.problems == ()

    def test_one_gpu_is_0(self):
        assert doctor.exit_code(self.examine("torch.distributed", gpus=1, code="world-size-1")) == 0

    def test_gpus_that_torch_does_not_see_are_1(self, tmp_path):
        (tmp_path / "0000:01:00.0").mkdir()
        document = self.examine("torch.distributed", gpus=0, code="cpu", proc_gpus=tmp_path)
        assert document.gpu_present and doctor.exit_code(document) == 1
        assert "the driver has 1 GPUs, torch sees none" in document.problems[0]

    def test_a_probe_that_breaks_is_a_problem_not_a_crash(self):
        def probe(device):
            raise OSError("no such thing")

        document = self.examine(probe=probe)
        assert doctor.exit_code(document) == 1 and document.verdict is None and document.probe == ()
        assert document.problems[0] == "probe of cuda:0: OSError: no such thing"
        doctor.render(document)

    def test_a_gpu_that_answers_nothing_is_a_problem(self):
        document = self.examine("torch.distributed", probe=lambda device: Caps(device, None, ("driver: error 999",)))
        assert "cuda:2: no usable GPU" in document.problems and doctor.exit_code(document) == 1
        assert "note         driver: error 999" in doctor.render(document)

    def test_bad_settings_are_a_problem(self, monkeypatch):
        monkeypatch.setenv("ALLREDUCE_JIT_PATH", "fastest")
        document = self.examine("v2")
        assert "ALLREDUCE_JIT_PATH='fastest'" in document.problems[0] and doctor.exit_code(document) == 1
        assert document.verdict is None
        assert document.environment["ALLREDUCE_JIT_PATH"] == "fastest"

    def test_a_switch_that_is_not_understood_is_told(self, monkeypatch):
        monkeypatch.setenv(V2_SWITCH, "")
        document = self.examine("v2")
        assert document.problems[0].startswith(f"{V2_SWITCH}='' is not understood, so V2 stays on")
        assert doctor.exit_code(document) == 0

    @pytest.mark.parametrize("module", ["cuda.bindings", "cuda.core", "triton"])
    def test_what_is_missing_is_told_with_what_it_costs(self, module, monkeypatch):
        monkeypatch.setattr(doctor, "_importable", lambda name: name != module)
        (problem,) = self.examine("torch.distributed", gpus=0, code="cpu").problems
        lost = {"cuda.bindings": "no GPU path at all", "cuda.core": "nothing compiles the kernels of v2"}
        lost["triton"] = "nothing compiles the kernels of legacy"
        assert problem.startswith(f"{module.replace('.', '-')} is not installed: {lost[module]}")

    def test_importable(self):
        assert doctor._importable("json.decoder")
        assert not doctor._importable("json.nothing") and not doctor._importable("no_such_package.shares_buffers_with")

    def test_notes_are_lines(self):
        document = self.examine("torch.distributed", probe=lambda device: Caps(device, None, ("nvrtc: not\nfound\n",)))
        assert "note         nvrtc: not found\n" in doctor.render(document)

    def test_command(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("ALLREDUCE_JIT_CACHE_DIR", str(tmp_path))
        pytest.importorskip("allreduce_jit.machine.probe")
        pytest.importorskip("allreduce_jit.policy.dispatch")
        pytest.importorskip("allreduce_jit.jit.cache")
        code = cli.main(["doctor", "--json"])
        document = json.loads(capsys.readouterr().out)
        assert code == doctor.exit_code(doctor.examine())
        assert document["verdict"]["path"] in ("v2", "legacy", "host", "torch.distributed")
        assert document["verdict"]["reasons"][0]["code"]


class TestWarmup:
    def run(self, capsys, monkeypatch, *options):
        built = []

        def catalogue(path, world_size, families=None, arch=None):
            if families is not None:  # kernels of one path, and of newer GPUs
                names = [
                    f"norm_{family.hidden}_{family.dtype}_ws{world_size}"
                    for family in families
                    if path == "v2" and arch != "sm_80"
                ]
                return [SimpleNamespace(name=name) for name in names]
            return [SimpleNamespace(name=f"{path}_ws{world_size}"), SimpleNamespace(name="shared")]

        def build(spec, arch, cache):
            if spec.name == "legacy_ws5":
                raise CompileError("syntax")
            built.append((spec.name, arch))
            return b"", spec.name == "shared"

        monkeypatch.setattr(warmup, "_open", lambda: SimpleNamespace(directory="/cache", problem=None))
        args = cli._parser().parse_args(["warmup", *options])
        code = warmup.run(args, catalogue, build)
        return code, built, capsys.readouterr().out

    def test_builds_each_kernel_once(self, capsys, monkeypatch):
        options = ("--arch", "sm_90", "--world-size", "2", "--json")
        code, built, out = self.run(capsys, monkeypatch, *options)
        assert code == 0 and built == [(name, "sm_90") for name in ("v2_ws2", "shared", "legacy_ws2", "host_ws2")]
        document = json.loads(out)
        assert (document["compiled"], document["cached"], document["failed"]) == (3, 1, 0)
        assert violations("warmup", document) == []

    def test_calls_with_a_norm(self, capsys, monkeypatch):
        options = (
            "--arch",
            "sm_90",
            "--world-size",
            "2",
            "--op",
            "add-rms-norm",
            "--hidden",
            "2880",
            "4096",
            "--dtype",
            "float16",
        )
        code, built, _ = self.run(capsys, monkeypatch, *options)
        fused = ["norm_2880_float16_ws2", "norm_4096_float16_ws2"]
        assert code == 0 and [name for name, _ in built] == [*fused, "norm_r_none_fp16_4096"]  # both of one size in Triton
        code, built, _ = self.run(capsys, monkeypatch, "--arch", "sm_80", *options[2:])
        assert code == 0 and built == [("norm_r_none_fp16_4096", "sm_80")]
        assert cli.main(["warmup", "--arch", "sm_90", "--op", "add-rms-norm", "--hidden", "100"]) == 2

    def test_a_kernel_that_does_not_compile_is_1_and_the_others_are_built(self, capsys, monkeypatch):
        code, built, out = self.run(capsys, monkeypatch, "--arch", "sm_100", "--path", "legacy")
        assert code == 1 and [name for name, _ in built] == [
            "legacy_ws2", "shared", "legacy_ws3", "legacy_ws4", "legacy_ws6", "legacy_ws7", "legacy_ws8"
        ]  # fmt: skip
        assert "legacy_ws5 sm_100: CompileError: syntax" in out
        assert "6 compiled, 1 cached, 1 failed" in out

    def test_without_a_gpu_the_architecture_must_be_named(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(warmup, "_open", lambda: None)
        pytest.importorskip("allreduce_jit.jit.compiler")
        assert cli.main(["warmup"]) == 2
        assert "--arch sm_90" in capsys.readouterr().err


def test_cache_commands(tmp_path, capsys, monkeypatch):
    pytest.importorskip("allreduce_jit.jit.cache")
    monkeypatch.setenv("ALLREDUCE_JIT_CACHE_DIR", str(tmp_path / "cache"))
    assert cli.main(["cache", "path"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "cache")
    assert cli.main(["cache", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == []
    assert cli.main(["cache", "clear"]) == 0
    assert "0 kernels removed" in capsys.readouterr().out
