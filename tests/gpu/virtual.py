"""All ranks of a world as one cooperative launch on one GPU: the real kernels, no peers needed."""

import ctypes

import torch

from allreduce_jit.abi import Args, Control, Header, NormArgs
from allreduce_jit.engine.driver import KernelLaunch, load_module
from allreduce_jit.engine.failure import Kind, abort_code, tag
from allreduce_jit.engine.memory import LocalState
from allreduce_jit.engine.nvlink import NvlinkEngine
from allreduce_jit.jit.cache import KernelCache
from allreduce_jit.jit.compiler import build
from allreduce_jit.policy import nvlink_norm
from allreduce_jit.policy.catalogue import KernelSpec, cuda_module, entry, nvlink_algorithms
from allreduce_jit.policy.norm import signed
from allreduce_jit.policy.norm_catalogue import norm_module
from allreduce_jit.policy.norm_forms import Form
from allreduce_jit.policy.nvlink import launches, make_layout
from allreduce_jit.policy.operation import OpSpec, all_reduce
from allreduce_jit.policy.plan import HEADER_BYTES, PACKET, Launch, Layout
from allreduce_jit.policy.tables import Band
from allreduce_jit.settings import Settings


def algorithms(world_size: int) -> list[str]:
    """Every V2 algorithm that some communicator of that size may run."""
    return list(dict.fromkeys(nvlink_algorithms(world_size) + nvlink_algorithms(world_size, few_sms=True)))


class VirtualWorld:
    """``world_size`` ranks whose staging memories are tensors of one GPU."""

    EMPTY = -1  # what slots hold at first

    def __init__(self, world_size: int, staging_mb: int = 32, cache: KernelCache | None = None):
        self.world_size = world_size
        # All ranks share the SMs, and a cooperative launch wants them all at once.
        self.sm_count = torch.cuda.get_device_properties(0).multi_processor_count // world_size
        self.layout, specs = self._algorithms(staging_mb << 20)
        major, minor = torch.cuda.get_device_capability()
        self.kernels = {}
        self.cache = cache or KernelCache(Settings.from_env().cache_dir)
        for spec in specs:
            module = load_module(build(spec, f"sm_{major}{minor}", self.cache)[0].cubin)
            self.kernels |= {name: module.kernel(name) for name in spec.entries}
        words = self.layout.nbytes // 4
        self.staging = [self._memory(words) for _ in range(world_size)]
        for staging in self.staging:
            staging[: HEADER_BYTES // 4] = 0
        words = (ctypes.sizeof(Control) + self.layout.channels * NvlinkEngine.channel_bytes) // 4
        self.local = [torch.zeros(words, dtype=torch.int32, device="cuda") for _ in range(world_size)]
        for local in self.local:
            local[Control.channels.offset // 4] = self.layout.channels
        self.report = torch.zeros(world_size, 16, dtype=torch.int32).pin_memory()

    def _algorithms(self, staging_bytes: int) -> tuple[Layout, list[KernelSpec]]:
        """The layout of all algorithms, and their modules."""
        names = algorithms(self.world_size)
        bands = tuple(Band(1 << 20, name, 32) for name in names)
        specs = [cuda_module(name, self.world_size, virtual_ranks=True) for name in names]
        return make_layout(self.world_size, staging_bytes, bands), specs

    def _memory(self, words: int) -> torch.Tensor:
        return torch.full((words,), self.EMPTY, dtype=torch.int32, device="cuda")

    def _launches(self, plan, spec: OpSpec) -> list[Launch]:
        return launches(plan, spec, self.world_size)

    def set_deadlines(self, seconds: float, grace: float | None = None) -> None:
        for local in self.local:
            local[Control.deadline_ns.offset // 4 :][:4].view(torch.int64).copy_(
                torch.tensor([int(s * 1e9) for s in (seconds, grace or seconds)])
            )

    def silence(self, rank: int) -> None:
        """As if ``rank`` had died: from now on it neither signs nor pushes."""
        self.staging[rank][Header.abort.offset // 4] = abort_code(Kind.ABORTED, rank, rank)

    def revive(self) -> None:
        """As new, after a rank was stopped."""
        self.report.zero_()
        for staging, local in zip(self.staging, self.local, strict=True):
            staging[: HEADER_BYTES // 4] = 0
            staging[HEADER_BYTES // 4 :] = self.EMPTY
            local[Control.reported.offset // 4] = 0
            local[ctypes.sizeof(Control) // 4 + 1 :: 2] = 0  # Channel.stopped
            # What was signed is gone from the header.
            for at in LocalState.COUNTS_AT:
                local[at // 4] = 0

    def all_reduce(self, plan, inputs, outs, tags: dict | None = None) -> None:
        """One call on every rank; ``tags``: what some ranks sign with instead of the truth."""
        numel, dtype = inputs[0].numel(), str(inputs[0].dtype).removeprefix("torch.")
        itemsize = inputs[0].element_size()
        aligned = all(t.data_ptr() % PACKET == 0 for t in (*inputs, *outs)) and numel * itemsize % PACKET == 0
        kernel = self.kernels[entry(plan.algorithm, dtype, self.world_size, aligned)]
        for piece in self._launches(plan, all_reduce(dtype, numel)):
            table = b""
            for rank in range(self.world_size):
                args = self._args(rank, plan.algorithm, dtype)
                args.input, args.output = (t[rank].data_ptr() + piece.start * itemsize for t in (inputs, outs))
                args.numel, args.total = piece.numel, numel
                for name, value in piece.arguments:
                    setattr(args, name, value)
                args.tag = (tags or {}).get(rank, args.tag)
                table += bytes(args)
            arguments = torch.frombuffer(bytearray(table), dtype=torch.uint8).cuda()
            launch = KernelLaunch(kernel, [ctypes.c_uint64(arguments.data_ptr())], piece.grid, plan.block, ranks=self.world_size)
            launch(torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()

    def norm(self, form: Form, spec: OpSpec, tensors: list[list[torch.Tensor]]) -> None:
        """One call of ``all_reduce_norm`` on every rank; ``tensors``: of each rank, one per pointer of ``spec``."""
        plan = nvlink_norm.plan_of(form, spec, self.world_size, self.layout)
        module = norm_module(form, spec.family, self.world_size, virtual_ranks=True)
        if module.name not in self.kernels:
            major, minor = torch.cuda.get_device_capability()
            self.kernels[module.name] = load_module(build(module, f"sm_{major}{minor}", self.cache)[0].cubin).kernel(module.name)
        algorithm = form.algorithm.removesuffix("_norm")  # whose region it is
        for piece in nvlink_norm.launches(plan, spec):
            table = b""
            for rank in range(self.world_size):
                args = NormArgs(call=self._args(rank, algorithm, spec.dtype), eps=spec.epilogue.eps)
                args.parameters = signed(spec.epilogue, spec.hidden)
                args.scale_row, args.scale_group = spec.epilogue.scale_strides if spec.epilogue.quant == "group" else (1, 0)
                args.call.numel, args.call.total, args.call.tag = piece.numel, spec.numel, tag(form.algorithm, spec.dtype)
                for name, value in piece.arguments:
                    setattr(args.call, name, value)
                for pointer, tensor in zip(spec.pointers, tensors[rank], strict=True):
                    where = args.call if pointer.name in ("input", "output") else args
                    setattr(where, pointer.name, tensor.data_ptr() + pointer.offset(piece.start))
                table += bytes(args)
            arguments = torch.frombuffer(bytearray(table), dtype=torch.uint8).cuda()
            launch = KernelLaunch(
                self.kernels[module.name], [ctypes.c_uint64(arguments.data_ptr())], piece.grid, plan.block, ranks=self.world_size
            )
            launch(torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()

    def fully_poisoned(self) -> bool:
        """Whether every slot is empty again."""
        return all(bool((staging[HEADER_BYTES // 4 :] == -1).all()) for staging in self.staging)

    def _args(self, rank: int, algorithm: str, dtype: str) -> Args:
        region, local = self.layout.regions[algorithm], self.local[rank]
        args = Args(
            own=self.staging[rank].data_ptr(),
            slots=region.offset,
            channels=local.data_ptr() + ctypes.sizeof(Control) + NvlinkEngine.channel_bytes * region.first_channel,
            control=local.data_ptr(),
            report=self.report[rank].data_ptr(),
            rank=rank,
            capacity=region.capacity,
            tag=tag(algorithm, dtype),
        )
        args.staging[: self.world_size] = [staging.data_ptr() for staging in self.staging]
        return args
