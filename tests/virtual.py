"""All ranks of a world as one cooperative launch on one GPU: the real kernels, no peers needed."""

import ctypes

import torch

from allreduce_jit.cache import KernelCache
from allreduce_jit.compiler import build
from allreduce_jit.driver import Launch, Module
from allreduce_jit.engine import DTYPE_NAMES
from allreduce_jit.kernel import ALGORITHMS, DTYPES, cuda_module
from allreduce_jit.plan import v2_layout
from allreduce_jit.v2 import Args


class VirtualWorld:
    """``world_size`` ranks whose staging memories are tensors of one GPU.
 """

    def __init__(self, world_size: int, staging_mb: int = 8, cache: KernelCache | None = None):
        self.world_size = world_size
        # All ranks share the multiprocessors, and a cooperative launch wants them all at once.
        self.sm_count = torch.cuda.get_device_properties(0).multi_processor_count // world_size
        self.layout = v2_layout(world_size, staging_mb << 20)
        major, minor = torch.cuda.get_device_capability()
        self.kernels = {}
        for algorithm in ALGORITHMS:
            spec = cuda_module(algorithm, world_size, virtual_ranks=True)
            module = Module(build(spec, f"sm_{major}{minor}", cache or KernelCache(None))[0].cubin)
            self.kernels |= {entry: module.kernel(entry) for entry in spec.entries}
        self.staging = [torch.full((self.layout.nbytes // 4,), -1, dtype=torch.int32, device="cuda") for _ in range(world_size)]
        channels = sum(region.channels for region in self.layout.regions.values())
        self.local = [torch.zeros(64 + channels, dtype=torch.int32, device="cuda") for _ in range(world_size)]
        self.report = torch.zeros(world_size, 16, dtype=torch.int32).pin_memory()

    def set_deadline(self, seconds: float) -> None:
        for local in self.local:
            local[2:4].view(torch.int64).fill_(int(seconds * 1e9))

    def all_reduce(self, algorithm: str, inputs, outs, grid: int, block: int, skip: tuple = ()) -> None:
        """One call on every rank but those in ``skip``, which get an empty tensor: their channels are idle."""
        dtype = DTYPES[DTYPE_NAMES[inputs[0].dtype]]
        kernel = self.kernels[f"{algorithm}_{dtype}_ws{self.world_size}"]
        args = b"".join(bytes(self._args(rank, algorithm, inputs[rank], outs[rank], rank in skip)) for rank in range(self.world_size))
        table = torch.frombuffer(bytearray(args), dtype=torch.uint8).cuda()
        launch = Launch(kernel, [ctypes.c_uint64(table.data_ptr())], grid, block, ranks=self.world_size)
        launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()

    def fully_poisoned(self) -> bool:
        """Whether every slot is empty again."""
        return all(bool((staging == -1).all()) for staging in self.staging)

    def _args(self, rank: int, algorithm: str, x, out, skip: bool) -> Args:
        region, local = self.layout.regions[algorithm], self.local[rank]
        before = 0
        for name in self.layout.regions:
            if name == algorithm:
                break
            before += self.layout.regions[name].channels
        args = Args(
            input=x.data_ptr(),
            output=out.data_ptr(),
            numel=0 if skip else x.numel(),
            epochs=local.data_ptr() + 256 + 4 * before,
            control=local.data_ptr(),
            report=self.report[rank].data_ptr(),
            rank=rank,
            capacity=region.capacity,
        )
        args.staging[: self.world_size] = [s.data_ptr() + region.offset for s in self.staging]
        return args
