"""Compiled kernels on disk: a hint that may be missing, damaged or read-only, never a reason to fail.

Each value carries a header with its digest, since a cubin with a flipped bit may well load and run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..machine import files
from .store import FileStore

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


_HEAD = {"key": str, "name": str, "arch": str, "threads": int, "shared_bytes": int}


def encode(key: str, artifact: Artifact) -> bytes:
    head = {"key": key, **{k: v for k, v in asdict(artifact).items() if k != "cubin"}}
    body = json.dumps(head, sort_keys=True).encode() + b"\n" + artifact.cubin
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode(blob: bytes) -> tuple[str, Artifact]:
    """Key and artifact. Raises ``ValueError`` for anything that ``encode`` did not write."""
    digest, _, body = blob.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("digest mismatch")
    head, _, cubin = body.partition(b"\n")
    fields = json.loads(head)
    if not isinstance(fields, dict) or {k: type(v) for k, v in fields.items()} != _HEAD:
        raise ValueError("another version's header")
    return fields.pop("key"), Artifact(cubin=cubin, **fields)


class KernelCache:
    """Artifacts by key, in memory for this process and on disk under ``directory`` where that works.

    Attributes:
        directory: where the files are, or would be.
        problem: why nothing new is kept on disk, or None.
    """

    def __init__(self, directory: Path | str | None):
        self.directory = None if directory is None else Path(directory)
        self.problem: str | None = None
        self._memory: dict[str, Artifact] = {}
        self._disk = None
        if self.directory is None:
            self.problem = files.NO_DIRECTORY
            log.warning("kernels are kept in memory only: %s", self.problem)
            return
        try:
            self._disk = FileStore(self.directory, MAX_BYTES)
            files.check_directory(self.directory)
        except Exception as e:  # noqa: BLE001 - whatever is wrong with a home directory must not fail a call
            self._complain(e)

    def get(self, key: str) -> Artifact | None:
        """The artifact stored under ``key``, intact and where it counts (``files``), else None; a damaged file is removed."""
        if key in self._memory:
            return self._memory[key]
        if self._disk is None:
            return None
        try:
            blob = self._disk.get(key)
        except Exception as e:  # noqa: BLE001 - this entry is missed, others may be fine
            log.info("kernel cache: an entry is not used: %s", e)
            return None
        if blob is None:
            return None
        try:
            stored, artifact = decode(bytes(blob))
            if stored != key:  # a file that was moved or copied here
                raise ValueError("another entry's file")
        except Exception:  # noqa: BLE001 - any damage: drop it, the caller compiles again
            log.info("kernel cache: dropping a damaged entry in %s", self.directory)
            self._drop(key)
            return None
        self._memory[key] = artifact
        return artifact

    def put(self, key: str, artifact: Artifact) -> None:
        self._memory[key] = artifact
        if self._disk is None or self.problem is not None:
            return
        try:
            self._disk[key] = encode(key, artifact)
        except Exception as e:  # noqa: BLE001
            self._complain(e)  # and go on reading: a read-only directory may hold everything else

    def entries(self) -> list[tuple[str, int]]:
        """(name and arch, bytes) of every artifact on disk that counts, sorted."""
        found = (artifact for _, artifact, _ in self._look() if artifact is not None)
        return sorted((f"{artifact.name} {artifact.arch}", len(artifact.cubin)) for artifact in found)

    def refused(self) -> list[tuple[str, str]]:
        """(file or directory, why) of everything on disk that does not count, sorted."""
        return sorted((str(path), why) for path, artifact, why in self._look() if artifact is None)

    def _look(self) -> Iterator[tuple[Path, Artifact | None, str]]:
        """All entries, and the directories that cannot be listed: each an artifact, or why it is none."""
        if self._disk is None or self.directory is None:
            return
        try:
            for folder in (self.directory, *self._disk.folders()):
                try:
                    os.listdir(folder)
                except (FileNotFoundError, NotADirectoryError):  # removed just now, or nothing of ours
                    continue
                except OSError as e:
                    yield folder, None, str(e)
            for path in self._disk.files(unfinished=False):
                try:
                    stored, artifact = decode(files.read(path, self.directory))
                    if self._disk.path(stored) != path:
                        raise ValueError("another entry's file")
                except FileNotFoundError:
                    continue
                except Exception as e:  # noqa: BLE001 - unreadable or damaged in whatever way
                    yield path, None, str(e)
                else:
                    yield path, artifact, ""
        except Exception as e:  # noqa: BLE001
            log.debug("kernel cache: %s", e)

    def clear(self) -> int:
        """Remove all entries from disk; returns how many intact ones have gone."""
        before = len(self.entries())
        self._memory.clear()
        if self._disk is not None:
            try:
                self._disk.clear()
            except Exception as e:  # noqa: BLE001
                self._complain(e)
        return before - len(self.entries())

    def _drop(self, key: str) -> None:
        try:
            if self._disk is not None:
                del self._disk[key]
        except Exception as e:  # noqa: BLE001
            log.debug("kernel cache: %s", e)

    def _complain(self, error: Exception) -> None:
        if self.problem is None:
            log.warning("kernel cache in %s is not usable, keeping kernels in memory only: %s", self.directory, error)
            self.problem = f"{type(error).__name__}: {error}"
