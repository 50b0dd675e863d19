"""Processes that can be told from any other: their identity, and a descriptor (pidfd) that tells when one has ended.

A process id alone proves nothing: it may mean another process in another container, or be in use again.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from dataclasses import dataclass
from typing import Any

from .sources import HostSource

log = logging.getLogger("allreduce_jit")


@dataclass(frozen=True)
class Process:
    """A process and what proves that it is meant; ``dataclasses.asdict`` gives its JSON.

    Attributes:
        pid: its id, in its own namespace.
        boot: the kernel's boot id, which tells hosts apart; empty if it cannot be known.
        namespaces: inodes of its namespaces of process ids and of time, ``pid/time``; empty if they cannot be known.
        started: when it started, in clock ticks since boot; -1 if that cannot be known.
    """

    pid: int
    boot: str
    namespaces: str
    started: int

    @classmethod
    def own(cls) -> Process:
        """This process."""
        pid = os.getpid()
        try:
            boot = HostSource().boot_id()
            if os.readlink("/proc/self") != str(pid):
                raise OSError("/proc is another namespace's")
            return cls(pid, boot, f"{_inode('pid')}/{_inode('time')}", start_ticks(pid))
        except (OSError, ValueError) as e:
            log.debug("watcher: this process cannot prove which one it is: %s", e)
            return cls(pid, "", "", -1)

    @classmethod
    def from_json(cls, fields: Any) -> Process:
        """Raises ``ValueError`` for anything that ``asdict`` did not give."""
        wanted = {"pid": int, "boot": str, "namespaces": str, "started": int}
        if not isinstance(fields, dict) or {k: type(v) for k, v in fields.items()} != wanted or fields["pid"] <= 0:
            raise ValueError(f"no process: {fields!r}")
        return cls(**fields)

    def refusal(self, here: Process) -> str | None:
        """Why ``here`` must not watch this process, or None."""
        if not (self.boot and self.namespaces and here.boot and here.namespaces):
            return "a process cannot prove its identity (no usable /proc)"
        if self.boot != here.boot:
            return "it runs under another kernel"
        if self.namespaces != here.namespaces:
            return "it lives in another namespace of process ids or of time"
        return None


def open_pidfd(peer: Process) -> tuple[int | None, str | None]:
    """A pidfd of ``peer``, or None if it is dead; or why there is none."""
    try:
        fd = os.pidfd_open(peer.pid)
    except ProcessLookupError:
        return None, None
    except AttributeError:  # Python was built for an older kernel
        return None, "this Python has no pidfd_open"
    except OSError as e:
        return None, f"pidfd_open: {errno.errorcode.get(e.errno or 0, e.errno)}"
    # Only now: a process held by a descriptor keeps its id, so that what /proc says is about that process.
    try:
        same = start_ticks(peer.pid) == peer.started
    except (OSError, ValueError) as e:
        if readable(fd):
            same = False
        else:
            os.close(fd)
            return None, f"/proc does not show it: {e}"
    if same:
        return fd, None
    os.close(fd)
    return None, None


def start_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The name, in parentheses, may hold anything, parentheses and spaces too.
        return int(file.read().rpartition(b")")[2].split()[19])


def _inode(kind: str) -> int:
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except FileNotFoundError:
        if kind == "time":  # before Linux 5.6
            return 0
        raise


def readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
