"""The plug-in for vLLM over a stand-in of vLLM: what it installs and refuses, whose calls it takes, its operators."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import pkgutil
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.fake_engines import MOST_ROWS, fake_gpus, logged, raised, suite
from helpers.fake_vllm import SIGNATURES, CudaCommunicator, fake_vllm
from helpers.fake_vllm import arguments as arguments_of

from allreduce_jit.errors import ClosedError, SettingsError, SetupError
from allreduce_jit.harness import ranks
from allreduce_jit.integrations import engines, present, vllm_fusion
from allreduce_jit.integrations import vllm as plugin
from allreduce_jit.integrations.engines import Group, group_of
from allreduce_jit.norms import add_rms_norm, add_rms_norm_fp8

HIDDEN = 64
CPU = torch.device("cpu")


@contextmanager
def environment(value, **others):
    with mock.patch.dict(os.environ, others):
        os.environ.pop("ALLREDUCE_JIT", None)
        if value is not None:
            os.environ["ALLREDUCE_JIT"] = value
        yield


def lines(records, level="INFO"):
    return [text for found, text in records if found == level and " in vLLM " in text]


def configuration(fuse=True, hidden=HIDDEN, quantization=None, more=None):
    passes = SimpleNamespace(fuse_allreduce_rms=fuse)
    model = SimpleNamespace(dtype=torch.bfloat16, quantization=quantization, get_hidden_size=lambda: hidden)
    return SimpleNamespace(
        compilation_config=SimpleNamespace(pass_config=passes), model_config=model, additional_config={} if more is None else more
    )


# -- on every rank


def off(place):
    """Without the variable, or with it off, vLLM is as it was, whatever else is wrong in the environment."""
    for value in (None, "0", "off"):
        with environment(value, ALLREDUCE_JIT_TYPO="1"), fake_vllm(place.control) as vllm, logged() as log:
            groups = vllm.start()
            assert type(groups["tp:0"].device_communicator) is CudaCommunicator and not log
    with environment("vllm"), fake_vllm(place.control) as vllm:
        raised(SettingsError, vllm.start, "ALLREDUCE_JIT='vllm'", "require")


def ours_first(place):
    with environment("1"), fake_gpus(place.control) as built, fake_vllm(place.control) as vllm, logged() as log:
        groups = vllm.start()
        vllm.plugins.load_general_plugins()  # may come again
        held = groups["tp:0"].device_communicator
        assert type(held).__name__ == "AllReduceJitCudaCommunicator" and isinstance(held, CudaCommunicator)
        assert getattr(plugin, type(held).__name__) is type(held) and type(held).__mro__[1:3] == (plugin.Asks, CudaCommunicator)
        (engine,) = built  # the other group has none
        x = torch.arange(24.0).view(4, 6) + place.rank
        copy, want = x.clone(), torch.arange(24.0).view(4, 6) * 2 + 1
        found = groups["tp:0"].all_reduce(x)
        assert torch.equal(found, want) and torch.equal(x, copy) and (engine.sums, held.calls) == (1, 0)
        assert found.stride() == torch.empty_like(x).stride()
        # What stays with vLLM, and why.
        others = [x.t(), torch.ones(3, dtype=torch.int64), torch.empty(0), torch.ones(3, requires_grad=True)]
        for left in others:
            groups["tp:0"].all_reduce(left.detach() if left.requires_grad else left)
        assert not group_of("tp:0").takes(others[-1])
        assert (engine.sums, held.calls) == (2, 3)
        group = group_of("tp:0")
        assert group.left == {"not contiguous": 1, "int64": 1, "empty": 1, "requires grad": 1}
        assert group.describe().taken == {"all_reduce": 2} and group.describe().communicator.path == "v2"
        groups["pp:0"].all_reduce(x.clone())
        assert groups["pp:0"].device_communicator.calls == 1
        (text,) = lines(log) or ("",)
        if place.rank == 0:
            assert "vLLM 0.33.0, group tp:0: v2 takes all-reduces first" in text and text.endswith("before us: nothing")
            assert "not ours, as no configuration of vLLM" in text
        else:
            assert not text
        groups["tp:0"].destroy()
        assert engine.closed == 1 and held.destroyed and group.comm.closed
        raised(ClosedError, lambda: group_of("tp:0"), "no open group 'tp:0'")
        assert torch.equal(groups["tp:0"].all_reduce(x), want) and held.calls == 4
        groups["tp:0"].destroy()


def refused_groups(place):
    """A group that ours cannot serve is vLLM's; with ``require`` that is an error on every rank."""
    for machine, arguments, why in (
        ("no-driver", {}, "tp:0: "),
        ("a100-vgpu-x2", {}, "tp:0: "),
        ("h200-x4", {"custom_all_reduce": False}, "--disable-custom-all-reduce"),
        ("h200-x4", {"more": {"tcp_store_group": object()}}, "stateless"),
    ):
        for value in ("1", "require"):
            with (
                environment(value),
                fake_gpus(place.control, machine) as built,
                fake_vllm(place.control, **arguments) as vllm,
                logged() as log,
            ):
                if value == "require":
                    raised(SetupError, vllm.start, "is not used in vLLM 0.33.0", why, "set ALLREDUCE_JIT=1")
                else:
                    groups = vllm.start()
                    held = groups["tp:0"].device_communicator
                    assert groups["tp:0"].all_reduce(torch.ones(2)).tolist() == [2.0, 2.0] and held.calls == 1
                    assert len(lines(log, "WARNING")) == (place.rank == 0) and all(why in text for text in lines(log, "WARNING"))
                assert not built


def another_plugin_comes_after(place):
    with environment("1"), fake_gpus(place.control), fake_vllm(place.control) as vllm, logged() as log:
        vllm.plugins.load_general_plugins()
        platform = type(vllm.platforms.current_platform)
        platform.get_device_communicator_cls = classmethod(lambda cls: f"{CudaCommunicator.__module__}.CudaCommunicator")
        vllm.distributed.parallel_state.initialize_model_parallel(2)
        (text,) = lines(log, "WARNING")
        assert "another plug-in" in text
        os.environ["ALLREDUCE_JIT"] = "require"
        raised(SetupError, lambda: vllm.distributed.parallel_state.initialize_model_parallel(2), "another plug-in")


def fusion_is_installed(place):
    """With a configuration that fuses: families are built at once, and vLLM's pass makes room, or it is said why not."""

    class Theirs:
        pass

    made = type("Made", (), {})
    for fuse, version, machine, has_pass, more, installed, why in (
        (True, "0.33.0", "h200-x4", True, None, True, None),
        (True, "0.32.1+cpu", "h200-x4", True, None, True, None),
        (False, "0.33.0", "h200-x4", True, None, False, "pass_config.fuse_allreduce_rms"),
        (True, "0.34.0", "h200-x4", True, None, False, "read in vLLM 0.32, 0.33, not in 0.34.0"),
        (True, "0.19.0", "h200-x4", True, None, False, "not in 0.19.0"),
        (True, "0.1.dev1+gabc", "h200-x4", True, None, False, "not in 0.1.dev1+gabc"),
        (True, "0.33.0", "a100-pcie-x4", True, None, False, "only the V2 path"),
        (True, "0.33.0", "h200-x4", False, None, False, "no AllReduceFusionPass"),
        (True, "0.33.0", "h200-x4", True, object(), False, "additional_config"),
    ):  # fmt: skip
        config = configuration(fuse, more=more)
        with (
            environment("1"),
            fake_gpus(place.control, machine) as built,
            fake_vllm(place.control, version, config=config) as vllm,
        ):
            manager = sys.modules["vllm.compilation.passes.pass_manager"]
            if has_pass:
                manager.AllReduceFusionPass = Theirs
            with logged() as log, mock.patch.object(vllm_fusion, "make_pass", lambda group: made):
                vllm.start()
            assert (getattr(manager, "AllReduceFusionPass", None) is made) is installed, why
            families = [family for family in built[0].families if family.epilogue is not None]
            assert len(families) == (2 if fuse and machine == "h200-x4" else 0)
            if isinstance(config.additional_config, dict):
                assert ("allreduce_jit" in config.additional_config) is installed
            for text in lines(log):
                assert ("ours in place of FlashInfer's" in text) is installed and (why is None or why in text), text
                assert ("before us: FlashInfer" in text) is (fuse and not installed)
    assert vllm_fusion.cache_key("tp:0") != vllm_fusion.cache_key("tp:1")


def a_pass_that_cannot_be_made(place):
    config = configuration()
    with environment("1"), fake_gpus(place.control), fake_vllm(place.control, config=config) as vllm, logged() as log:
        vllm.start()  # this vLLM has no vllm_inductor_pass
        assert (
            all("vLLM's passes are not what they were" in text for text in lines(log))
            and "allreduce_jit" not in config.additional_config
        )


def families_of_a_configuration(place):
    for quantization, hidden, count in ((None, HIDDEN, 2), ("fp8", HIDDEN, 4), (None, 60, 0)):
        found = plugin._families(configuration(quantization=quantization, hidden=hidden), CPU)
        assert len(found) == count and all(family.hidden == hidden for family in found)
    assert vllm_fusion.unfit(configuration()) is None and "no model" in vllm_fusion.unfit(SimpleNamespace(model_config=None))
    assert "hidden 60" in vllm_fusion.unfit(configuration(hidden=60))
    assert plugin._families(None, CPU) == plugin._families(configuration(fuse=False), CPU) == []


def operators(place):
    """Both operators: bits, counts, calls without a kernel, and what torch asks of an operator."""
    theirs = []

    def engines_own(x):
        theirs.append(x.shape)
        torch.distributed.all_reduce(x, group=place.control)  # in place, as those of some platforms are
        return x

    ops = torch.ops.allreduce_jit_vllm
    with fake_gpus(place.control) as built:
        group = Group.over("tp:9", place.control, CPU, engines_own)
        (engine,) = built
        generator = torch.Generator().manual_seed(11)
        x = torch.randn(place.world_size, 4, HIDDEN, generator=generator).bfloat16()[place.rank].contiguous()
        residual, weight = (
            torch.randn(4, HIDDEN, generator=generator).bfloat16(),
            torch.randn(HIDDEN, generator=generator).bfloat16(),
        )
        total, kept = group.all_reduce(x), x.clone()
        for added in (residual, None):
            for bias in (0, 1):
                found = ops.add_rms_norm(x, added, weight, 1e-5, bias, "tp:9")
                want = add_rms_norm(total, added, weight, 1e-5, weight_bias=bias)
                assert all(torch.equal(a, b) for a, b in zip(found, want))
            for scale in (torch.full((1,), 0.03), torch.tensor(0.03)):
                quantized, summed = ops.add_rms_norm_fp8(x, added, weight, scale, 1e-5, "tp:9")
                want = add_rms_norm_fp8(total, added, weight, 1e-5, scale=scale.reshape(1))
                assert torch.equal(quantized.view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(summed, want[2])
        assert engine.norms == 8 and not theirs
        assert group.taken == {"all_reduce": 1, "add_rms_norm": 4, "add_rms_norm_fp8": 4}
        assert group.fuses(MOST_ROWS, HIDDEN, torch.bfloat16) and not group.fuses(MOST_ROWS + 1, HIDDEN, torch.bfloat16)
        for arguments in ((x, residual, weight, 1e-5, 0, "tp:9"), (x, None, weight, 1e-5, 1, "tp:9")):
            torch.library.opcheck(ops.add_rms_norm.default, arguments)
        torch.library.opcheck(ops.add_rms_norm_fp8.default, (x, residual, weight, torch.ones(1), 1e-5, "tp:9"))
        # A compiled piece of a model, with any number of rows.
        piece = torch.compile(
            lambda x, r, w: ops.add_rms_norm(x * 1, r, w, 1e-6, 0, "tp:9"), backend="aot_eager", fullgraph=True, dynamic=True
        )
        for rows in (1, 4, 3):
            found, want = piece(x[:rows], residual[:rows], weight), add_rms_norm(total[:rows], residual[:rows], weight, 1e-6)
            assert all(torch.equal(a, b) for a, b in zip(found, want))
        # No kernel of ours sums it: the engine does, and the norm is ours.
        with mock.patch.object(group.comm, "takes", lambda numel, dtype: False):
            found, want = ops.add_rms_norm(x, residual, weight, 1e-5, 0, "tp:9"), add_rms_norm(total, residual, weight, 1e-5)
            assert all(torch.equal(a, b) for a, b in zip(found, want)) and theirs == [x.shape]
            quantized, _ = ops.add_rms_norm_fp8(x, residual, weight, torch.ones(1), 1e-5, "tp:9")
            assert quantized.dtype is torch.float8_e4m3fn and len(theirs) == 2 and torch.equal(x, kept)
        assert group.left == {"no kernel for the size": 2}
        group.close()
        raised(ClosedError, lambda: ops.add_rms_norm(x, residual, weight, 1e-5, 0, "tp:9"), "'tp:9'", "build it before")
        assert (
            group.describe().communicator is None
            and group.describe().to_dict()["communicator"] == {}
            and not group.takes(x)
            and group.left["closed"] == 1
        )


CASES = [off, ours_first, refused_groups, another_plugin_comes_after, fusion_is_installed, a_pass_that_cannot_be_made,
         families_of_a_configuration, operators]  # fmt: skip


def test_two_ranks():
    assert len(ranks.run(suite, CASES, cpu=2, deadline=200).value) == len(CASES)


# -- in this process: a vLLM whose insides have moved


class Renamed(CudaCommunicator):
    destroy = None


class TakesAnOperator(CudaCommunicator):
    def all_reduce(self, input_, op):
        return input_


class InPlace(CudaCommunicator):
    def all_reduce(self, input_, out=None):  # a default more is no obstacle
        return input_


class WithoutAGroup:
    def __init__(self, ranks):
        pass

    def all_reduce(self, input_):
        return input_

    def destroy(self):
        pass


@pytest.mark.parametrize(
    ("base", "why"),
    [
        (Renamed, "Renamed has no destroy()"),
        (TakesAnOperator, "TakesAnOperator.all_reduce takes (self, input_, op)"),
        (WithoutAGroup, "is built without cpu_group, device, unique_name"),
        (lambda: None, "is a function, not a class"),
        (CudaCommunicator, None),
        (InPlace, None),
    ],
)
def test_classes_that_have_moved(base, why):
    found = plugin.class_over(base)
    if why is None:
        assert issubclass(found, base) and plugin.class_over(base) is found
    else:
        assert isinstance(found, str) and why in found


def take_away(vllm, what):
    if what == "platform":
        vllm.platforms.current_platform = object()
    else:
        delattr(vllm.distributed.parallel_state, what)


@pytest.mark.parametrize("what", ["platform", "initialize_model_parallel", "get_tp_group"])
@pytest.mark.parametrize("value", ["1", "require"])
def test_a_vllm_that_has_moved(what, value, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with environment(value), fake_vllm(torch.distributed.group.WORLD, "9.9.0") as vllm, logged() as log:
            take_away(vllm, what)
            if value == "require":
                with pytest.raises(SetupError, match="is not used in vLLM 9.9.0: .* has no"):
                    vllm.plugins.load_general_plugins()
            else:
                vllm.plugins.load_general_plugins()
                assert len(lines(log, "WARNING")) == 1 and "9.9.0" in lines(log, "WARNING")[0]
    finally:
        torch.distributed.destroy_process_group()


def test_entry_points():
    """Of the installation, which `make` renews when pyproject.toml changes."""
    for group, value in (
        ("vllm.general_plugins", "allreduce_jit.integrations.vllm:register"),
        ("sglang.srt.plugins", "allreduce_jit.integrations.sglang_plugin:register"),
    ):
        (point,) = {point for point in importlib.metadata.entry_points(group=group) if point.name == "allreduce_jit"}
        assert point.value == value and callable(point.load())


def test_importing_the_plugins_imports_no_engine():
    import subprocess

    code = "import sys, allreduce_jit.integrations.vllm, allreduce_jit.integrations.sglang_plugin as p; print({'vllm', 'sglang'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("0.33.0", (0, 33)),
        ("0.32.1+cpu", (0, 32)),
        ("1.0.0rc1", (1, 0)),
        ("0.33.0.dev3+g1", None),
        ("0.1.dev1", None),
        ("dev", None),
    ],
)
def test_releases(text, release):
    assert present.release_of(text) == release


def test_what_is_said_is_shown(capsys):
    """vLLM configures its own logger, not the root's, and after plug-ins are loaded; ours has no handler that shows anything."""
    ours, theirs, root = logging.getLogger("allreduce_jit"), logging.getLogger("a-vllm"), logging.getLogger()
    before, level, roots = list(ours.handlers), ours.level, list(root.handlers)
    shown = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    try:
        ours.handlers = [logging.NullHandler()]  # the package's own; other tests have registered the plug-in
        ours.setLevel(logging.NOTSET)
        engines.speak_through("a-vllm")
        engines.speak_through("a-vllm")
        ours.info("the root's handlers show this")
        assert not shown
        root.handlers = []
        ours.info("nobody listens")
        ours.warning("nobody listens to %s", "this either")
        assert capsys.readouterr().err == "nobody listens to this either\n"
        theirs.addHandler(handler)
        theirs.setLevel(logging.INFO)
        ours.info("a line")
        ours.debug("too much")
        theirs.setLevel(logging.ERROR)
        ours.info("too much")
        assert shown == ["a line"]
    finally:
        root.handlers, ours.handlers = roots, before
        ours.setLevel(level)
        theirs.removeHandler(handler)


def test_the_stand_in_has_the_signatures_it_says(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with fake_vllm(torch.distributed.group.WORLD):
            for name, arguments in SIGNATURES.items():
                assert arguments_of(pkgutil.resolve_name(name)) == arguments, name
    finally:
        torch.distributed.destroy_process_group()
