"""Deaths of peers, known at once: one thread per process waits on the pidfds of all of them.

Ranks exchange their ``Process``, and only one that means the same here is watched; a refusal is a value, not an error,
since the kernels' deadline protects all the same.
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Mapping

from .process import Process, open_pidfd, readable

log = logging.getLogger("allreduce_jit")

_JOIN_S = 1.0


class Watch:
    """Made by ``watch``.

    Attributes:
        watched: the ranks whose death will be told.
        refused: rank -> why its death will not be noticed.
    """

    def __init__(self, on_death: Callable[[int], None]):
        self.watched: tuple[int, ...] = ()
        self.refused: dict[int, str] = {}
        self._on_death = on_death
        self._loop: _Loop | None = None

    def close(self) -> None:
        """No callback begins after this; idempotent, and allowed inside a callback.

        One that runs in the watcher's thread right now comes to its end.
        """
        with _lock:
            loop, self._loop = self._loop, None
            thread = loop.thread if loop is not None and loop.remove(self) else None  # which ends now
        if thread is not None and thread is not threading.current_thread():
            # Bounded: a callback still under way may be waiting for something that our caller holds.
            thread.join(_JOIN_S)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _notify(self, rank: int) -> None:
        if self._loop is None:
            return
        try:
            self._on_death(rank)
        except Exception:
            log.exception("watcher: the callback for rank %d failed", rank)


def watch(peers: Mapping[int, Process], on_death: Callable[[int], None], level: int = logging.WARNING) -> Watch:
    """Call ``on_death(rank)`` once for each of ``peers`` that dies, or is dead already, until the watch is closed.

    Args:
        peers: rank -> the process that it told us it is; children and strangers alike.
        on_death: called in the watcher's thread with no lock held; it must be quick, as it delays all others.
            Kept until ``close``, so it should hold no reference to what closes the watch when collected.
        level: of the log line that says why a rank cannot be watched.

    Returns:
        The watch; ``refused`` names the ranks that cannot be watched. Each reason is logged once per process.
    """
    handle = Watch(on_death)
    here = Process.own()
    opened: dict[int, int] = {}  # pidfd -> rank
    dead = []
    for rank, peer in peers.items():
        problem = peer.refusal(here)
        fd = None
        if problem is None:
            fd, problem = open_pidfd(peer)
        if problem is not None:
            handle.refused[rank] = problem
        elif fd is None:
            dead.append(rank)
        else:
            opened[fd] = rank
    for rank, problem in handle.refused.items():
        _warn_once(rank, problem, level)
    handle.watched = tuple(sorted([*opened.values(), *dead]))
    if handle.watched:
        try:
            with _lock:
                _running_loop().add(handle, opened, dead)
        except (OSError, RuntimeError) as e:  # out of descriptors or threads
            for fd in opened:
                os.close(fd)
            handle.refused |= dict.fromkeys(handle.watched, f"no thread to watch it with: {e}")
            _warn_once(handle.watched[0], f"no thread to watch it with: {e}", level)
            handle.watched = ()
    return handle


class _Loop:
    """The thread and its descriptors; they live from the first watch to the last.

    All methods but ``run`` are called with ``_lock`` held.
    """

    def __init__(self) -> None:
        self.peers: dict[int, tuple[Watch, int]] = {}
        self.watches: set[Watch] = set()
        self.dead: deque[tuple[Watch, int]] = deque()
        self.ended = False
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.epoll = select.epoll()
            self.epoll.register(self.wake, select.EPOLLIN)
            self.thread = threading.Thread(target=self.run, name="allreduce_jit watcher", daemon=True)
            self.thread.start()
        except BaseException:
            self.close_descriptors()
            raise
        _live.add(self)

    def add(self, handle: Watch, opened: Mapping[int, int], dead: list[int]) -> None:
        try:
            for fd in opened:
                self.epoll.register(fd, select.EPOLLIN)
        except OSError:
            for fd in opened:
                _quietly(self.epoll.unregister, fd)
            if not self.watches:
                self.end()
            raise
        handle._loop = self
        self.watches.add(handle)
        self.peers.update({fd: (handle, rank) for fd, rank in opened.items()})
        self.dead.extend((handle, rank) for rank in dead)
        if dead:
            os.eventfd_write(self.wake, 1)

    def remove(self, handle: Watch) -> bool:
        """Forget a watch; whether it was the last one."""
        self.watches.discard(handle)
        for fd in [fd for fd, (owner, _) in self.peers.items() if owner is handle]:
            self.forget(fd)
        if not self.watches:
            self.end()
        return not self.watches

    def forget(self, fd: int) -> tuple[Watch, int]:
        self.epoll.unregister(fd)
        os.close(fd)
        return self.peers.pop(fd)

    def end(self) -> None:
        global _loop
        if _loop is self:
            _loop = None
        if not self.ended:
            self.ended = True
            os.eventfd_write(self.wake, 1)

    def run(self) -> None:
        while True:
            events = self.epoll.poll()
            with _lock:
                if self.ended:
                    self.close_descriptors()
                    return
                _quietly(os.eventfd_read, self.wake)
                # An event is a hint: its descriptor may have been closed since, and its number be another's now.
                found = [self.forget(fd) for fd, _ in events if fd in self.peers and readable(fd)]
                found += self.dead
                self.dead.clear()
            while found:
                handle, rank = found.pop(0)
                handle._notify(rank)
            handle = None  # or it would be kept alive while this thread waits

    def close_descriptors(self) -> None:
        if hasattr(self, "epoll"):
            self.epoll.close()
        os.close(self.wake)
        _live.discard(self)

    def abandon(self) -> None:
        """In a forked child, where the thread is not: give back what was inherited and leave the parent's alone."""
        for fd in self.peers:
            os.close(fd)
        self.peers.clear()
        self.close_descriptors()
        for handle in self.watches:
            handle._loop = None
        self.watches.clear()


# Reentrant: the collector may close a watch while this very thread holds it.
_lock = threading.RLock()
_loop: _Loop | None = None
_live: set[_Loop] = set()  # _loop, and ended ones whose thread has not closed their descriptors yet
_warned: set[str] = set()


def _running_loop() -> _Loop:
    global _loop
    if _loop is None:
        _loop = _Loop()
    return _loop


def _quietly(call: Callable[[int], object], fd: int) -> None:
    try:
        call(fd)
    except (OSError, ValueError):
        pass


def _warn_once(rank: int, problem: str, level: int) -> None:
    if problem not in _warned:
        _warned.add(problem)
        log.log(level, "the death of rank %d will be noticed by the deadline alone: %s", rank, problem)


def _after_fork_in_child() -> None:
    global _lock, _loop
    _loop = None
    _lock = threading.RLock()
    for loop in list(_live):
        loop.abandon()


def _at_exit() -> None:
    """No callback into an interpreter that is being taken down."""
    with _lock:
        watches = list(_loop.watches) if _loop is not None else []
    for handle in watches:
        handle.close()


os.register_at_fork(before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
