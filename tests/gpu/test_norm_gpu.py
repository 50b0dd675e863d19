"""The local norm's kernel on a GPU, against the reference on the CPU, every bit; and that reference on the GPU."""

import pytest
import torch
from helpers.norms import Case, cases, difference, given, options, outs

from allreduce_jit.norms import operands, run_local

pytestmark = pytest.mark.gpus(1)

HIDDENS = [64, 2880, 4096, 5120, 7168, 8192, 16384]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def built():
    """All modules, several at a time."""
    from allreduce_jit.engine import local_norm
    from allreduce_jit.jit.compiler import build_all
    from allreduce_jit.policy.local_norm import module

    torch.zeros(1, device="cuda")  # makes the context current
    major, minor = torch.cuda.get_device_capability()
    modules = dict.fromkeys(module(on_cpu(case, run=False).spec) for case in cases(HIDDENS, rows=(1,)))
    build_all([(spec, f"sm_{major}{minor}") for spec in modules], local_norm._cubins())


def on_cpu(case, run=True):
    call = operands(**given(case), **options(case), operation="norm", device=CPU, index=-1, rank=None)
    if run:
        run_local(call.spec, call.tensors)
    return call


def on_gpu(case, run=run_local):
    tensors = {name: tensor if tensor is None else tensor.cuda() for name, tensor in given(case).items()}
    device = tensors["x"].device
    call = operands(
        **tensors, **options(case), **outs(case, tensors), operation="norm", device=device, index=device.index, rank=None
    )
    held = [tensor.data_ptr() for tensor in tensors.values() if tensor is not None]
    for result in call.results:
        if result.data_ptr() not in held:  # so that elements nobody wrote are seen
            result.view(torch.uint8).fill_(0x5A) if result.is_contiguous() else result.fill_(-5.0)
    run(call.spec, call.tensors)
    return call


def check(chosen, **how):
    for case in chosen:
        found = difference(case, on_gpu(case, **how).results, on_cpu(case).results)
        assert not found, f"{case}: {found}"


@pytest.mark.parametrize("rounding", ["R", "U", "H"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_kernel_has_the_bits_of_the_reference(dtype, rounding):
    check(cases(HIDDENS, rows=(1, 3, 129), dtypes=[dtype], roundings=[rounding]))


def test_torch_on_a_gpu_has_them_too():
    """It takes over where there is no Triton."""
    from allreduce_jit.engine import norm_reference

    check(cases([64, 2880, 4096], rows=(9,)), run=norm_reference.run)


def test_rsqrt_of_a_million_sums():
    from allreduce_jit.engine import norm_reference

    x = torch.randn(1 << 20, 64, device="cuda") * torch.logspace(-12, 12, 1 << 20, device="cuda")[:, None]
    device = x.device
    calls = [
        operands(x, None, torch.ones(64, device="cuda"), 0.0, operation="norm", device=device, index=device.index, rank=None)
        for _ in range(2)
    ]
    run_local(calls[0].spec, calls[0].tensors)
    norm_reference.run(calls[1].spec, calls[1].tensors)
    assert torch.equal(calls[0].results[0], calls[1].results[0])


@pytest.mark.parametrize("max_ctas", [1, 3, 64, 4096])
def test_any_grid(max_ctas):
    check(
        cases([2880, 4096], rows=(129,), dtypes=["bfloat16"], roundings=["R"]),
        run=lambda spec, tensors: run_local(spec, tensors, max_ctas),
    )


def test_captured_without_an_earlier_call():
    """Whatever a first call sets up does not spoil a capture; on a stream of its own, and replayed with other values."""
    from allreduce_jit import add_rms_norm
    from allreduce_jit.engine import local_norm

    local_norm._kernel.cache_clear()
    local_norm._calls.clear()
    for hidden in (1024, 2048):  # which no other test has loaded
        case = Case("bfloat16", hidden, 9)
        tensors = {name: tensor.cuda() for name, tensor in given(case).items() if tensor is not None}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = add_rms_norm(**tensors)
        for seed in (1, 2):
            other = Case("bfloat16", hidden, 9, seed=seed)
            fresh = {name: tensor for name, tensor in given(other).items() if tensor is not None}
            for name, tensor in fresh.items():
                tensors[name].copy_(tensor)
            graph.replay()
            assert not difference(other, got, add_rms_norm(**fresh))


def test_tensors_that_are_copied_and_another_stream():
    from allreduce_jit import add_rms_norm

    case = Case("float16", 5120, 33)
    tensors = {name: tensor for name, tensor in given(case).items() if tensor is not None}
    wide = {name: torch.stack([tensor, tensor], dim=-1).cuda()[..., 0] for name, tensor in tensors.items()}
    out = torch.empty(33, 2, 5120, dtype=torch.float16, device="cuda")[:, 1]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = add_rms_norm(**wide, out=out)
    stream.synchronize()
    assert got[0] is out
    assert not difference(case, [result.contiguous() for result in got], add_rms_norm(**tensors))


PAIRS = """
extern "C" __global__ void pairs(unsigned *wrong) {{
    const u32 a = blockIdx.x * 0x10001u;
    for (u32 b = threadIdx.x; b < 1 << 16; b += blockDim.x) {{
        const u32 word = b | ((1 << 16) - 1 - b) << 16;
        float f[2], g[2];
        {T}::unpack(a, f);
        {T}::unpack(word, g);
        const float sum[2] = {{__fadd_rn(f[0], g[0]), __fadd_rn(f[1], g[1])}};
        if ({T}::add(a, word) != {T}::pack(sum)) atomicAdd(wrong, 1);
    }}
}}
"""


@pytest.mark.parametrize("name", ["Fp16", "Bf16"])
def test_additions_of_two_are_those_in_fp32_for_all_pairs(name):
    """``add`` of kernels/cuda/packet.cuh, which sums and residuals use, of 16-bit numbers: the same bits, NaN included."""
    import ctypes

    from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch

    from allreduce_jit.jit import source

    wrong = torch.zeros(1, dtype=torch.int32, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    text = source.expand("packet.cuh", source.files()) + PAIRS.format(T=name)
    program = Program(text, "c++", ProgramOptions(arch=f"sm_{major}{minor}", std="c++17"))
    kernel = program.compile("cubin").get_kernel("pairs")
    device = Device(torch.cuda.current_device())
    device.set_current()
    stream = device.create_stream()
    launch(stream, LaunchConfig(grid=1 << 16, block=256), kernel, ctypes.c_uint64(wrong.data_ptr()))
    stream.sync()
    assert int(wrong) == 0
