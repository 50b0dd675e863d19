"""Compiled kernels on disk: a hint that may be missing, damaged or read-only, never a reason to fail.

Storage (atomic replacement, size cap, several processes) is cuda.core's ``FileStreamProgramCache``. Each
value carries a header with its digest, since a cubin with a flipped bit may well load and run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger("allreduce_jit")

MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Artifact:
    """A compiled module.

    Attributes:
        name: the ``KernelSpec`` name.
        arch: e.g. ``sm_90``.
        threads: threads per block that the kernel was compiled for; 0 = the launch decides.
        shared_bytes: dynamic shared memory per block.
        cubin: the machine code.
    """

    name: str
    arch: str
    threads: int
    shared_bytes: int
    cubin: bytes


def encode(artifact: Artifact) -> bytes:
    head = {k: v for k, v in asdict(artifact).items() if k != "cubin"}
    body = json.dumps(head, sort_keys=True).encode() + b"\n" + artifact.cubin
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode(blob: bytes) -> Artifact:
    """Raises ``ValueError`` for anything that ``encode`` did not write."""
    digest, _, body = blob.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("digest mismatch")
    head, _, cubin = body.partition(b"\n")
    return Artifact(cubin=cubin, **json.loads(head))


class KernelCache:
    """Artifacts by key, in memory for this process and on disk under ``directory`` where that works.

    Attributes:
        directory: where the files are, or would be.
        problem: why nothing is kept on disk, or None.
    """

    def __init__(self, directory: Path | str | None):
        self.directory = None if directory is None else Path(directory)
        self.problem: str | None = None
        self._memory: dict[str, Artifact] = {}
        self._disk = None
        if self.directory is None:
            self.problem = "no cache directory"
            return
        try:
            from cuda.core.utils import FileStreamProgramCache

            self._disk = FileStreamProgramCache(self.directory, max_size_bytes=MAX_BYTES)
        except Exception as e:  # noqa: BLE001 - whatever is wrong with a home directory must not fail a call
            self._give_up_disk(e)

    def get(self, key: str) -> Artifact | None:
        """The artifact stored under ``key`` and intact, else None; a damaged file is removed."""
        if key in self._memory:
            return self._memory[key]
        if self._disk is None:
            return None
        try:
            blob = self._disk.get(key)
        except Exception as e:  # noqa: BLE001
            self._give_up_disk(e)
            return None
        if blob is None:
            return None
        try:
            artifact = decode(bytes(blob))
        except Exception:  # noqa: BLE001 - any damage: drop it, the caller compiles again
            log.info("kernel cache: dropping a damaged entry in %s", self.directory)
            self._drop(key)
            return None
        self._memory[key] = artifact
        return artifact

    def put(self, key: str, artifact: Artifact) -> None:
        self._memory[key] = artifact
        if self._disk is None:
            return
        try:
            self._disk[key] = encode(artifact)
        except Exception as e:  # noqa: BLE001
            self._give_up_disk(e)

    def entries(self) -> list[tuple[str, int]]:
        """(name and arch, bytes) of every intact artifact on disk, sorted."""
        found = []
        for path in self._files():
            try:
                artifact = decode(path.read_bytes())
            except (OSError, ValueError, TypeError):
                continue
            found.append((f"{artifact.name} {artifact.arch}", len(artifact.cubin)))
        return sorted(found)

    def clear(self) -> int:
        """Remove all entries from disk; returns how many intact ones there were."""
        count = len(self.entries())
        self._memory.clear()
        if self._disk is not None:
            try:
                self._disk.clear()
            except Exception as e:  # noqa: BLE001
                self._give_up_disk(e)
        return count

    def _files(self):
        if self.directory is None or not self.directory.is_dir():
            return []
        return [p for p in self.directory.rglob("*") if p.is_file()]

    def _drop(self, key: str) -> None:
        try:
            del self._disk[key]
        except Exception as e:  # noqa: BLE001
            log.debug("kernel cache: %s", e)

    def _give_up_disk(self, error: Exception) -> None:
        if self.problem is None:
            log.warning("kernel cache in %s is not usable, keeping kernels in memory only: %s", self.directory, error)
        self.problem = f"{type(error).__name__}: {error}"
        self._disk = None
