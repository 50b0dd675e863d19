"""Staging memory on the host that all ranks of a group have mapped, pinned and given to their GPUs.

Each rank's is a memfd: memory with a file descriptor and no name, so nothing is left behind whoever is killed, and no size of /dev/shm
counts. Peers open it through /proc, as they run under the same kernel, in the same PID namespace (``checks.COMMON``).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Sequence

from cuda.bindings import driver

from ..errors import SetupError
from ..machine.numa import running_near
from ..policy.plan import HEADER_BYTES
from .driver import call

GRANULARITY = 64 << 10  # whole pages of every kernel


class _Mapping:
    """A file in this process's memory and in its GPU's."""

    def __init__(self, fd: int, nbytes: int):
        with contextlib.ExitStack() as undo:
            memory = mmap.mmap(fd, nbytes)
            undo.callback(memory.close)
            view = (ctypes.c_ubyte * nbytes).from_buffer(memory)
            self.host = ctypes.addressof(view)
            del view  # it would keep ``memory`` from being closed; the pages stay where they are
            flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
            call("cuMemHostRegister", self.host, nbytes, flags)
            undo.callback(call, "cuMemHostUnregister", self.host)
            self.device = int(call("cuMemHostGetDevicePointer", self.host, 0))
            self._undo = undo.pop_all()

    def close(self) -> None:
        self._undo.close()


class HostStaging:
    """This rank's staging memory, and its peers' as mapped here: zeros at first.

    Attributes:
        addresses: base address per rank, for kernels, once ``connect`` returned.
        nbytes: size, the same on all ranks.
    """

    FILL = 0  # of slots, at first

    def __init__(self, nbytes: int, rank: int, near: str | None = None):
        """``near``: bus id of the GPU whose NUMA node is to have it; None: wherever this thread runs."""
        self.nbytes = -(-nbytes // GRANULARITY) * GRANULARITY
        self.rank = rank
        self.addresses: list[int] = []
        self._lock = threading.Lock()
        self._mappings: dict[int, _Mapping] = {}
        self._fd = os.memfd_create("allreduce_jit", os.MFD_CLOEXEC)
        try:
            os.fchmod(self._fd, 0o600)  # whoever else may look into /proc
            with running_near(near):
                os.posix_fallocate(self._fd, 0, self.nbytes)  # here, rather than a fault when there is no memory
            self._mappings[rank] = _Mapping(self._fd, self.nbytes)
        except BaseException:
            self.close()
            raise

    def handle(self) -> str:
        """What peers need to map this memory."""
        what = os.fstat(self._fd)
        return f"{os.getpid()} {self._fd} {what.st_dev} {what.st_ino}"

    def connect(self, handles: Sequence[str]) -> None:
        """Map every peer's memory; ``handles`` in rank order."""
        for rank, handle in enumerate(handles):
            if rank != self.rank:
                self._mappings[rank] = self._opened(rank, *map(int, handle.split()))
        self.addresses = [self._mappings[rank].device for rank in range(len(handles))]

    def _opened(self, rank: int, pid: int, number: int, device: int, inode: int) -> _Mapping:
        path = f"/proc/{pid}/fd/{number}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise SetupError(
                f"rank {self.rank} cannot open the shared memory of rank {rank} ({path}: {e.strerror}): all ranks need one user, "
                "and a /proc that shows each the others"
            ) from e
        try:
            what = os.fstat(fd)
            if (what.st_dev, what.st_ino, what.st_size) != (device, inode, self.nbytes):
                raise SetupError(f"rank {self.rank} finds another file at {path} than the memory of rank {rank}")
            return _Mapping(fd, self.nbytes)
        finally:
            os.close(fd)

    def read(self, rank: int, nbytes: int) -> bytes:
        """The first ``nbytes`` of that rank's slots, through the copy engine."""
        buffer = (ctypes.c_ubyte * nbytes)()
        call("cuMemcpyDtoH", ctypes.addressof(buffer), self.addresses[rank] + HEADER_BYTES, nbytes)
        return bytes(buffer)

    def peek(self, rank: int, offset: int, nbytes: int) -> bytes:
        """What is there now, seen from this process; zeros once closed."""
        with self._lock:
            mapping = self._mappings.get(rank)
            return bytes(nbytes) if mapping is None else ctypes.string_at(mapping.host + offset, nbytes)

    def poke(self, rank: int, offset: int, word: int) -> None:
        """Store a 32-bit word; nothing once closed. From any thread."""
        with self._lock:
            if rank in self._mappings:
                ctypes.c_uint32.from_address(self._mappings[rank].host + offset).value = word

    def close(self) -> None:
        with self._lock:
            self.addresses = []
            with contextlib.ExitStack() as stack:
                if self._fd >= 0:
                    stack.callback(os.close, self._fd)
                    self._fd = -1
                while self._mappings:
                    stack.callback(self._mappings.popitem()[1].close)
