"""Which CPUs are near a GPU, and memory there: pages are taken where the thread runs that asks for them first."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("allreduce_jit")

DEVICES = Path("/sys/bus/pci/devices")


def cpus_near(bus_id: str, devices: Path = DEVICES) -> set[int]:
    """The CPUs of the NUMA node of the device at ``bus_id``, e.g. ``0000:1A:00.0``; none if that is not known."""
    domain, _, rest = bus_id.lower().partition(":")
    try:
        text = (devices / f"{domain[-4:]}:{rest}" / "local_cpulist").read_text()
        return _parsed(text)
    except (OSError, ValueError) as e:
        log.debug("no CPUs known to be near %s: %s", bus_id, e)
        return set()


def _parsed(text: str) -> set[int]:
    """Of ``0-3,8``."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


@contextlib.contextmanager
def running_near(bus_id: str | None) -> Iterator[None]:
    """This thread runs on CPUs near that device meanwhile, as far as it may; where that is not known, as before."""
    before = os.sched_getaffinity(0)
    wanted = cpus_near(bus_id) & before if bus_id else set()
    try:
        if wanted:
            os.sched_setaffinity(0, wanted)
        yield
    finally:
        if wanted:
            os.sched_setaffinity(0, before)
