"""climb(): whatever fails on whichever rank, all ranks take the same rung for the same reasons, and none waits."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch
from helpers.fake_engines import STAGES, fake_gpus, raised, suite

from allreduce_jit.errors import InputError, PeerTimeoutError, SettingsError
from allreduce_jit.harness import ranks
from allreduce_jit.policy.operation import ALL_REDUCE, OpSpec
from allreduce_jit.policy.verdict import Path, Reason
from allreduce_jit.setup import ladder
from allreduce_jit.setup.ladder import climb
from allreduce_jit.setup.stages import Stages, StepDown

CPU = torch.device("cpu")
CODES = dict.fromkeys(("construct", "compile", "load", "allocate"), "build-failed") | {
    "connect": "map-failed",
    "verify": "verify-failed",
}
ODD = [KeyError("missing"), SystemError("bad call"), MemoryError(), RuntimeError("two\nlines"), ValueError("\ud800"),
       RuntimeError("x" * 100_000), StopIteration(), AssertionError()]  # fmt: skip


def agreed(place, found):
    """Path, codes, ranks and texts of a ladder, the same on all ranks."""
    verdict = found.verdict
    mine = (verdict.path.value, [(r.code, r.rank, r.text) for r in verdict.reasons], verdict.full_nvlink, verdict.backend)
    everyone = place.gather(mine)
    assert everyone == [everyone[0]] * place.world_size, everyone
    assert (found.engine is None) == (verdict.path is Path.TORCH)
    return verdict.path, [r.code for r in verdict.reasons], [r.rank for r in verdict.reasons]


PLANTED = RuntimeError("planted")


def where(place, who, *keys, error=PLANTED):
    """``fails`` of this rank: the stages ``keys``, if it is one of ``who``."""
    return dict.fromkeys(keys, error) if place.rank in who else {}


def lived_well(built, found):
    """Every engine built was closed once, but for the one in use, and stages came in order."""
    for engine in built:
        assert engine.closed == (engine is not found.engine and engine.events != ["construct"]), engine.events
        stages = [event for event in engine.events if event != "close"]
        assert stages == list(STAGES[: len(stages)]), engine.events
        assert engine.events[len(stages) :] in ([], ["close"])


def healthy(place):
    with fake_gpus(place.control) as built:
        found = climb(place.control, CPU)
    assert agreed(place, found) == (Path.V2, ["full-nvlink"], [None])
    (engine,) = built
    assert engine is found.engine and engine.events == list(STAGES)
    assert set(found.timings) == {"probe_s", "build_s", "map_s", "verify_s", "total_s"}
    config = engine.config
    assert (config.rank, config.world_size, config.arch, config.nvlink) == (place.rank, place.world_size, "sm_90", True)


def under_other_defaults(place):
    """Model code builds its layers with a default device, or in inference mode."""
    with torch.device("meta"), torch.inference_mode(), fake_gpus(place.control):
        assert agreed(place, climb(place.control, CPU)) == (Path.V2, ["full-nvlink"], [None])
        assert torch.empty(0).device.type == "meta"


def every_stage_on_every_kind_of_rank(place):
    errors = itertools.cycle(ODD)
    for stage, who in itertools.product(STAGES, ({0}, {2}, {1, 3}, {0, 1, 2, 3})):
        error = next(errors)
        with fake_gpus(place.control, fails=where(place, who, ("v2", stage), error=error)) as built:
            found = climb(place.control, CPU)
        assert agreed(place, found) == (Path.LEGACY, [CODES[stage]], [min(who)]), stage
        text = found.verdict.reasons[0].text
        assert text.startswith(f"rank {min(who)}: {type(error).__name__}: ") and text.endswith(str(error)), text
        assert found.engine.path == "legacy" and found.engine.config.nvlink
        assert [engine.path for engine in built] == ["v2", "legacy"]
        lived_well(built, found)


def both_rungs_fail(place):
    for first, second in itertools.product(STAGES, STAGES):
        fails = where(place, {1}, ("v2", first)) | where(place, {2, 3}, ("legacy", second), error=OSError(7, "odd"))
        with fake_gpus(place.control, fails=fails) as built:
            found = climb(place.control, CPU)
        codes = [CODES[first], CODES[second]]
        if {"map-failed", "verify-failed"} & set(codes):  # what was to carry the data does not: NCCL would rely on it
            assert agreed(place, found) == (Path.HOST, codes, [1, 2]) and found.engine.path == "host"
        else:
            assert agreed(place, found) == (Path.TORCH, [*codes, "has-p2p"], [1, 2, None])
            assert found.verdict.full_nvlink is None
        assert found.verdict.backend == "nccl"
        lived_well(built, found)


def all_rungs_fail(place):
    for third in STAGES:
        fails = where(place, {1}, ("v2", "verify")) | where(place, {2}, ("legacy", "load")) | where(place, {3}, ("host", third))
        with fake_gpus(place.control, fails=fails) as built:
            found = climb(place.control, CPU)
        assert agreed(place, found) == (Path.TORCH, ["verify-failed", "build-failed", CODES[third]], [1, 2, 3])
        assert [engine.path for engine in built] == ["v2", "legacy", "host"] and found.verdict.full_nvlink is None
        lived_well(built, found)


def through_host_memory(place):
    """The best rung where GPUs cannot reach each other; and where somebody wants it."""
    with fake_gpus(place.control, "l40s-x4-vm") as built:
        found = climb(place.control, CPU)
    assert agreed(place, found)[:2] == (Path.HOST, ["no-nvlink", "no-p2p"]) and len(built) == 1
    assert len(set(found.engine.config.bus_ids)) == place.world_size
    os.environ["ALLREDUCE_JIT_PATH"] = "host" if place.rank == 2 else "auto"
    try:
        with fake_gpus(place.control) as built:
            found = climb(place.control, CPU)
    finally:
        del os.environ["ALLREDUCE_JIT_PATH"]
    assert agreed(place, found) == (Path.HOST, ["path-forced"], [2]) and len(built) == 1
    with fake_gpus(place.control) as built:
        found = climb(place.control, CPU, highest=Path.HOST)
    assert agreed(place, found)[0] is Path.HOST and len(built) == 1
    with fake_gpus(place.control, "l40s-x4-vm", where(place, {1}, ("host", "allocate"), error=OSError(12, "no memory"))) as built:
        found = climb(place.control, CPU)
    assert agreed(place, found)[:2] == (Path.TORCH, ["no-nvlink", "no-p2p", "build-failed"])
    lived_well(built, found)


def different_stages_on_different_ranks(place):
    fails = where(place, {3}, ("v2", "load")) | where(place, {0}, ("v2", "connect"), ("v2", "verify"))
    with fake_gpus(place.control, fails=fails) as built:
        found = climb(place.control, CPU)
    assert agreed(place, found) == (Path.LEGACY, ["build-failed"], [3])
    assert "connect" not in built[0].events
    lived_well(built, found)


def below_full_nvlink(place):
    with fake_gpus(place.control, "a100-pcie-x4") as built:
        found = climb(place.control, CPU)
    path, codes, _ = agreed(place, found)
    assert path is Path.LEGACY and codes[0] in ("no-nvlink", "partial-nvlink") and len(built) == 1
    assert not found.engine.config.nvlink
    with fake_gpus(place.control, "a100-pcie-x4", where(place, {3}, ("legacy", "verify"))) as built:
        found = climb(place.control, CPU)
    assert agreed(place, found)[:2] == (Path.HOST, [*codes, "verify-failed"])
    lived_well(built, found)


def no_rung_below(place):
    def change(caps):
        return replace(caps, software=replace(caps.software, triton=None)) if place.rank == 1 else caps

    with fake_gpus(place.control, fails=where(place, {2}, ("v2", "connect")), change=change) as built:
        found = climb(place.control, CPU)
    assert agreed(place, found) == (Path.HOST, ["map-failed", "no-triton"], [2, 1])
    assert [engine.path for engine in built] == ["v2", "host"]
    lived_well(built, found)


def who_waited_in_vain_is_not_to_blame(place):
    error = RuntimeError("wrong bytes") if place.rank == 2 else PeerTimeoutError("waited waiting for rank 2")
    with fake_gpus(place.control, fails={("v2", "verify"): error}):
        found = climb(place.control, CPU)
    assert agreed(place, found) == (Path.LEGACY, ["verify-failed"], [2])
    with fake_gpus(place.control, fails=where(place, {1, 3}, ("v2", "verify"), error=PeerTimeoutError("late"))):
        found = climb(place.control, CPU)
    assert agreed(place, found) == (Path.LEGACY, ["verify-failed"], [1])


def a_close_that_fails_leaves_nobody_alone(place):
    fails = where(place, {0}, ("v2", "load")) | where(place, {0, 2}, ("v2", "close"))
    with fake_gpus(place.control, fails=fails) as built:
        found = climb(place.control, CPU)
    assert agreed(place, found) == (Path.LEGACY, ["build-failed"], [0])
    lived_well(built, found)


def only_one_rung_is_wanted(place):
    with fake_gpus(place.control) as built:
        found = climb(place.control, CPU, highest=Path.LEGACY)
        assert agreed(place, found) == (Path.LEGACY, ["v2-switched-off"], [None])
        assert "asked for the legacy kernels" in found.verdict.reasons[0].text and len(built) == 1
        found = climb(place.control, CPU, lowest=Path.V2)
        assert agreed(place, found)[0] is Path.V2
    with fake_gpus(place.control, fails=where(place, {1}, ("v2", "load"))) as built:
        found = climb(place.control, CPU, lowest=Path.V2)
        assert agreed(place, found) == (Path.TORCH, ["build-failed"], [1])
        assert [engine.path for engine in built] == ["v2"]
    with fake_gpus(place.control, "a100-pcie-x4") as built:
        found = climb(place.control, CPU, lowest=Path.V2)
        assert agreed(place, found)[0] is Path.TORCH and not built
        found = climb(place.control, CPU, highest=Path.LEGACY, lowest=Path.LEGACY)  # the true reason, not the request
        assert "v2-switched-off" not in agreed(place, found)[1] and found.verdict.path is Path.LEGACY


def what_has_to_be_the_same_on_all_ranks(place):
    """Sizes of the staging memory follow from the smallest; requests that differ are an error, not a hang."""
    os.environ["ALLREDUCE_JIT_STAGING_MB"] = str(40 - place.rank)
    try:
        with fake_gpus(place.control):
            config = climb(place.control, CPU, max_ctas=9).engine.config
    finally:
        del os.environ["ALLREDUCE_JIT_STAGING_MB"]
    assert (config.settings.staging_mb, config.max_ctas) == (41 - place.world_size, 9)
    with fake_gpus(place.control) as built:
        raised(InputError, lambda: climb(place.control, CPU, place.rank == 2), "rank 2", "'deterministic': True", "rank 0")
        highest = Path.LEGACY if place.rank else Path.V2
        raised(InputError, lambda: climb(place.control, CPU, highest=highest), "rank 1 asks for", "alike")
        raised(InputError, lambda: climb(place.control, CPU, max_ctas=2 + place.rank), "'max_ctas': 3", "alike")
        assert not built


def kernels_of_a_live_engine(place):
    """What is built later is agreed as at first, and leaves the engine open if it fails, with one reason on all ranks."""
    with fake_gpus(place.control) as built:
        found = climb(place.control, CPU)
        agree = Stages(place.control, CPU, None, 60.0, found.timings)
        seconds = dict(found.timings)
        more = [OpSpec("all_reduce", "float8_e4m3fn")]
        agree.build_kernels(found.engine, more)
        assert found.engine.families == [*ALL_REDUCE, *more]
        mine = more if place.rank == 1 else ALL_REDUCE
        raised(InputError, lambda: agree.build_kernels(found.engine, mine), "rank 1 asks for the kernels of", "float8_e4m3fn")
        assert found.engine.events == [*STAGES, "compile", "load", "verify"]
        assert {name for name in seconds if found.timings[name] > seconds[name]} == {"build_s", "verify_s"}
        for stage in ("compile", "load", "verify"):
            found.engine.fails = where(place, {2}, ("v2", stage))
            step = raised(StepDown, lambda: agree.build_kernels(found.engine, [OpSpec("all_reduce", "float64")]))
            assert step.reason == Reason(CODES[stage], "rank 2: RuntimeError: planted", 2)
            assert found.engine.families == [*ALL_REDUCE, *more]  # no rank takes what some rank could not verify
    assert built == [found.engine] and not found.engine.closed


def settings(place):
    for name, value, words in (
        ("ALLREDUCE_JIT_TIMEOUT", "soon", ("ALLREDUCE_JIT_TIMEOUT='soon'", "seconds")),
        ("ALLREDUCE_JIT_PTAH", "torch", ("unknown environment variable ALLREDUCE_JIT_PTAH", "ALLREDUCE_JIT_PATH")),
        ("ALLREDUCE_JIT_CACHE_DIR", "~nobody-of-that-name/x", ("home",)),
    ):
        if place.rank == 1:
            os.environ[name] = value
        with fake_gpus(place.control) as built:
            for call in (lambda: climb(place.control, CPU), lambda: ladder.v2_is_on(place.control)):
                raised(SettingsError, call, "rank 1: ", *words)
        assert not built
        os.environ.pop(name, None)
    if place.rank == 2:
        os.environ["SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2"] = "Off"
    assert ladder.v2_is_on(place.control) is False
    with fake_gpus(place.control):
        assert agreed(place, climb(place.control, CPU)) == (Path.LEGACY, ["v2-switched-off"], [2])
    os.environ.pop("SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2", None)
    assert ladder.v2_is_on(place.control) is True


def without_gpus(place):
    found = climb(place.control, CPU)
    assert agreed(place, found) == (Path.TORCH, ["cpu"], [0]) and found.verdict.backend == "gloo"


def interrupted_everywhere(place):
    for stage in STAGES[1:]:
        with fake_gpus(place.control, fails={("v2", stage): KeyboardInterrupt()}) as built:
            raised(KeyboardInterrupt, lambda: climb(place.control, CPU))
        assert [(engine.path, engine.closed) for engine in built] == [("v2", 1)]


def interrupted_on_one_rank(place):
    with fake_gpus(place.control, fails=where(place, {1}, ("v2", "verify"), error=KeyboardInterrupt())) as built:
        try:
            climb(place.control, CPU)
        finally:
            assert [(engine.path, engine.closed) for engine in built] == [("v2", 1)]


CASES = [
    healthy,
    under_other_defaults,
    every_stage_on_every_kind_of_rank,
    both_rungs_fail,
    all_rungs_fail,
    through_host_memory,
    different_stages_on_different_ranks,
    below_full_nvlink,
    no_rung_below,
    who_waited_in_vain_is_not_to_blame,
    a_close_that_fails_leaves_nobody_alone,
    only_one_rung_is_wanted,
    what_has_to_be_the_same_on_all_ranks,
    kernels_of_a_live_engine,
    settings,
    without_gpus,
    interrupted_everywhere,
]


def test_four_ranks():
    assert len(ranks.run(suite, CASES, cpu=4, deadline=200).value) == len(CASES)


def test_a_rank_that_leaves_keeps_nobody_waiting(monkeypatch):
    """It raises at once; its connections go with it, and that is an error on the others."""
    monkeypatch.setattr(ranks, "_GRACE_S", 30.0)
    with pytest.raises(ranks.RanksFailedError) as caught:
        ranks.run(interrupted_on_one_rank, cpu=3, deadline=60)
    assert sorted(caught.value.failed) == [0, 1, 2] and not caught.value.unfinished
    assert "KeyboardInterrupt" in caught.value.failed[1]
    assert not any("AssertionError" in text for text in caught.value.failed.values())
