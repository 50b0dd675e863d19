"""What tests of the cache directory keep in it: two kernels, and tables of a tuning."""

from __future__ import annotations

import pathlib
from dataclasses import replace

from allreduce_jit.jit.cache import Artifact
from allreduce_jit.paths import Path
from allreduce_jit.policy import measured_tables as tuned
from allreduce_jit.policy.host import HOST_TABLES, HostBand
from allreduce_jit.policy.tables import KIB, MIB, NEVER, NVLINK_TABLES, Band

from .fakes import MACHINES, look

KEY = "a" * 64
SMALL = Artifact("one_shot_ws2", "sm_90", 128, 2048, b"\x7fELF" + bytes(range(48)))
OTHER = replace(SMALL, name="two_shot_ws2", cubin=b"\x7fELF other")
FACTS = tuned.fingerprint(look(MACHINES["h200-x4"], 0), 4)
LEGACY_FACTS = tuned.fingerprint(look(MACHINES["a100-pcie-x4"], 0), 4, Path.LEGACY)
HOST_FACTS = tuned.fingerprint(look(MACHINES["l40s-x4-vm"], 0), 4, Path.HOST)
ODD = (Band(3 * KIB, "one_shot", 256), Band(99 * MIB, "two_shot", 128), Band(NEVER, "two_shot_stream", 64))
TABLES = {"float32": ODD, "float16": ODD[1:], "bfloat16": NVLINK_TABLES[4]}
HOST_ODD = (HostBand(10_000, "host_one_shot", 32, 64), HostBand(NEVER, "host_two_shot", 128, 96))
HOST_TABLES_KEPT = {"float32": HOST_ODD, "float16": (HostBand(NEVER, "host_one_shot", 64, 256),), "bfloat16": HOST_TABLES[4]}


def files(directory):
    return [path for path in pathlib.Path(directory).rglob("*") if path.is_file()]
