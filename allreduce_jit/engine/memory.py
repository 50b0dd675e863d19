"""Staging memory that all ranks of a group have mapped; owns every address that a kernel is given.

Plain device memory shared by CUDA IPC handles: nothing of the user's is ever registered, and the CUDA
caching allocator's settings (expandable segments, pluggable allocators) do not matter.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from ctypes import sizeof
from typing import Any

from cuda.bindings import driver

from ..abi import Control
from ..policy.plan import HEADER_BYTES
from .driver import beside_captures, call

GRANULARITY = 2 << 20  # allocations of whole 2 MiB pages share no page with anything else
REPORT_BYTES = 64  # a Report, and what fills its cache line


def _bytes_of(handle: driver.CUipcMemHandle) -> Any:
    """The handle's memory, for as long as the handle lives. Its member ``reserved``, which holds the same, is gone from cuda-bindings 13.4.4."""
    return (ctypes.c_char * driver.CU_IPC_HANDLE_SIZE).from_address(handle.getPtr())


class StagingMemory:
    """This rank's staging memory, and its peers' as mapped here: ``HEADER_BYTES`` of zeros, then poison.

    Attributes:
        addresses: base address per rank, once ``connect`` returned.
        nbytes: size, the same on all ranks.
    """

    FILL = 0xFF  # of slots, at first

    def __init__(self, nbytes: int, rank: int):
        self.nbytes = -(-nbytes // GRANULARITY) * GRANULARITY
        self.rank = rank
        self.addresses: list[int] = []
        self._local = int(call("cuMemAlloc", self.nbytes))
        # No abort, no signature, nothing arrived: before any peer can know the address.
        call("cuMemsetD32", self._local, 0, HEADER_BYTES // 4)
        call("cuMemsetD32", self._local + HEADER_BYTES, 0xFFFFFFFF, (self.nbytes - HEADER_BYTES) // 4)
        call("cuCtxSynchronize")

    def handle(self) -> str:
        """What peers need to map this memory, in hex."""
        ipc = call("cuIpcGetMemHandle", self._local)
        return _bytes_of(ipc).raw.hex()

    def connect(self, handles: Sequence[str]) -> None:
        """Map every peer's memory; ``handles`` in rank order."""
        for rank, handle in enumerate(handles):
            if rank == self.rank:
                self.addresses.append(self._local)
                continue
            ipc = driver.CUipcMemHandle()
            _bytes_of(ipc).raw = bytes.fromhex(handle)
            flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
            self.addresses.append(int(call("cuIpcOpenMemHandle", ipc, flags.value)))

    def read(self, rank: int, nbytes: int) -> bytes:
        """The first ``nbytes`` of that rank's slots, through the copy engine."""
        buffer = (ctypes.c_ubyte * nbytes)()
        call("cuMemcpyDtoH", ctypes.addressof(buffer), self.addresses[rank] + HEADER_BYTES, nbytes)
        return bytes(buffer)

    def close(self) -> None:
        for rank, address in enumerate(self.addresses):
            if rank != self.rank:
                call("cuIpcCloseMemHandle", address)
        self.addresses = []
        if self._local:
            call("cuMemFree", self._local)
            self._local = 0


class SideChannel:
    """Small copies between host and device beside kernels that spin: to stop them, and to learn why.

    Usable from any thread, beside a graph capture of any thread; everything is allocated ahead, as allocating would wait for
    those kernels.
    """

    NBYTES = 4096

    def __init__(self):
        self._lock = threading.Lock()
        self._context = call("cuCtxGetCurrent")
        self._stream = call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
        self._host = int(call("cuMemHostAlloc", self.NBYTES, 0))

    def write(self, addresses: Sequence[int], word: int) -> None:
        """Store a 32-bit word at every address; nothing once closed."""
        with self._lock:
            if not self._host:
                return
            ctypes.c_uint32.from_address(self._host).value = word
            self._run(lambda: [call("cuMemcpyHtoDAsync", address, self._host, 4, self._stream) for address in addresses])

    def read(self, address: int, nbytes: int) -> bytes:
        """``nbytes`` <= ``NBYTES`` of device memory."""
        with self._lock:
            self._run(lambda: call("cuMemcpyDtoHAsync", self._host, address, nbytes, self._stream))
            return ctypes.string_at(self._host, nbytes)

    def _run(self, copies) -> None:
        with beside_captures():
            call("cuCtxPushCurrent", self._context)
            try:
                copies()
                call("cuStreamSynchronize", self._stream)
            finally:
                call("cuCtxPopCurrent")

    def close(self) -> None:
        with self._lock:
            if self._host:
                call("cuStreamDestroy", self._stream)
                call("cuMemFreeHost", self._host)
                self._host = 0


class LocalState:
    """What only this rank's kernels touch: a ``Control`` and the channels in device memory, the ``Report`` on the host.

    The channels follow the control block, ``channel_bytes`` each, and begin with their u32 epoch.

    Attributes:
        control: address of the control block.
        table: address of legacy's table of staging memories, in the control block.
        channels: address of the first channel.
        report: address of the report, for kernels.
        words: the report, for the host.
    """

    COUNTS_AT = Control.sequence.offset, Control.completed.offset, Control.entered.offset  # equal while no call is in flight

    def __init__(self, channels: int, channel_bytes: int):
        nbytes = sizeof(Control) + channel_bytes * channels
        self.nbytes = -(-nbytes // GRANULARITY) * GRANULARITY
        self.control = int(call("cuMemAlloc", self.nbytes))
        call("cuMemsetD32", self.control, 0, self.nbytes // 4)
        call("cuMemsetD32", self.control + Control.channels.offset, channels, 1)
        self.channels = self.control + sizeof(Control)
        self.table = self.control + Control.table.offset
        flags = driver.CU_MEMHOSTALLOC_DEVICEMAP | driver.CU_MEMHOSTALLOC_PORTABLE
        self.report = int(call("cuMemHostAlloc", REPORT_BYTES, flags))
        ctypes.memset(self.report, 0, REPORT_BYTES)
        self.words = (ctypes.c_uint32 * (REPORT_BYTES // 4)).from_address(self.report)

    def set_deadlines(self, deadline: float, grace: float) -> None:
        """Seconds that kernels launched from now on wait for a peer (0 = for ever): in a shape of call that is handshaken,
        and in one that is not."""
        values = Control(deadline_ns=int(deadline * 1e9), grace_ns=int(grace * 1e9))
        self._store(values, Control.deadline_ns.offset, Control.deadline_ns.size + Control.grace_ns.size)

    def store_table(self, addresses: Sequence[int]) -> None:
        """Where legacy's kernels find the staging memory of each rank, at most ``MAX_RANKS`` of them."""
        values = Control()
        values.table[: len(addresses)] = addresses
        self._store(values, Control.table.offset, Control.table.size)

    def _store(self, values: Control, offset: int, nbytes: int) -> None:
        call("cuMemcpyHtoD", self.control + offset, ctypes.addressof(values) + offset, nbytes)

    def close(self) -> None:
        if self.control:
            call("cuMemFree", self.control)
            self.words = (ctypes.c_uint32 * (REPORT_BYTES // 4))()
            call("cuMemFreeHost", self.report)
            self.control = 0
