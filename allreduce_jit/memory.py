"""Staging memory that all ranks of a group have mapped; owns every address that a kernel is given.

Plain device memory shared by CUDA IPC handles: nothing of the user's is ever registered, and the CUDA
caching allocator's settings (expandable segments, pluggable allocators) do not matter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from cuda.bindings import driver

from .driver import call

GRANULARITY = 2 << 20  # allocations of whole 2 MiB pages share no page with anything else
REPORT_BYTES = 64


class StagingMemory:
    """This rank's staging memory, and its peers' as mapped here.

    Attributes:
        addresses: base address per rank, once ``connect`` returned.
        nbytes: size, the same on all ranks.
    """

    def __init__(self, nbytes: int, rank: int):
        self.nbytes = -(-nbytes // GRANULARITY) * GRANULARITY
        self.rank = rank
        self.addresses: list[int] = []
        self._local = int(call("cuMemAlloc", self.nbytes))
        # "Not arrived", before any peer can know the address.
        call("cuMemsetD32", self._local, 0xFFFFFFFF, self.nbytes // 4)
        call("cuCtxSynchronize")

    def handle(self) -> str:
        """What peers need to map this memory, in hex."""
        return bytes(call("cuIpcGetMemHandle", self._local).reserved).hex()

    def connect(self, handles: Sequence[str]) -> None:
        """Map every peer's memory; ``handles`` in rank order."""
        for rank, handle in enumerate(handles):
            if rank == self.rank:
                self.addresses.append(self._local)
                continue
            ipc = driver.CUipcMemHandle()
            ipc.reserved = bytes.fromhex(handle)
            flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
            self.addresses.append(int(call("cuIpcOpenMemHandle", ipc, flags.value)))

    def read(self, rank: int, nbytes: int) -> bytes:
        """The first ``nbytes`` of that rank's memory, through the copy engine."""
        buffer = (ctypes.c_ubyte * nbytes)()
        call("cuMemcpyDtoH", ctypes.addressof(buffer), self.addresses[rank], nbytes)
        return bytes(buffer)

    def close(self) -> None:
        for rank, address in enumerate(self.addresses):
            if rank != self.rank:
                call("cuIpcCloseMemHandle", address)
        self.addresses = []
        if self._local:
            call("cuMemFree", self._local)
            self._local = 0


class LocalState:
    """What only this rank's kernels touch: the control block, epoch words, and the report on the host.

    Device layout: ``Control`` (staging.cuh: poisoned u32, reserved u32, deadline u64 ns) in the first
    ``CONTROL_BYTES``, then one u32 epoch per channel of each algorithm, in the layout's order.

    Attributes:
        control: address of the control block.
        epochs: address of the first epoch word, per algorithm.
        report: address of the report, for kernels.
        words: the report, for the host.
    """

    CONTROL_BYTES = 256

    def __init__(self, channels: Mapping[str, int]):
        nbytes = self.CONTROL_BYTES + 4 * sum(channels.values())
        self.nbytes = -(-nbytes // GRANULARITY) * GRANULARITY
        self.control = int(call("cuMemAlloc", self.nbytes))
        call("cuMemsetD32", self.control, 0, self.nbytes // 4)
        self.epochs = {}
        address = self.control + self.CONTROL_BYTES
        for algorithm, count in channels.items():
            self.epochs[algorithm] = address
            address += 4 * count
        flags = driver.CU_MEMHOSTALLOC_DEVICEMAP | driver.CU_MEMHOSTALLOC_PORTABLE
        self.report = int(call("cuMemHostAlloc", REPORT_BYTES, flags))
        ctypes.memset(self.report, 0, REPORT_BYTES)
        self.words = (ctypes.c_uint32 * (REPORT_BYTES // 4)).from_address(self.report)

    def set_deadline(self, seconds: float) -> None:
        """How long kernels launched from now on wait for a peer; 0 = for ever."""
        value = ctypes.c_uint64(int(seconds * 1e9))
        call("cuMemcpyHtoD", self.control + 8, ctypes.addressof(value), 8)

    def close(self) -> None:
        if self.control:
            call("cuMemFree", self.control)
            self.words = (ctypes.c_uint32 * (REPORT_BYTES // 4))()
            call("cuMemFreeHost", self.report)
            self.control = 0
