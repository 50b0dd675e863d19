"""Blobs by key in a directory: written whole or not at all, by any number of processes at once.

cuda.core's ``FileStreamProgramCache`` does as much, but importing cuda.core takes longer than all else that a
construction with a warm cache does; here it is imported only where something has to be compiled.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..machine import files

_STALE_S = 3600.0  # a temporary file of a writer that has died


class FileStore:
    """All methods raise ``OSError`` where the file system refuses.

    Args:
        directory: made if it does not exist; other files in it are left alone.
        max_bytes: beyond that, what was written longest ago goes.
    """

    def __init__(self, directory: Path, max_bytes: int):
        self.directory = directory
        self.max_bytes = max_bytes
        files.make_directory(directory)

    def path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.directory / name[:2] / name[2:]

    def get(self, key: str) -> bytes | None:
        try:
            return files.read(self.path(key), self.directory)
        except FileNotFoundError:
            return None

    def __setitem__(self, key: str, blob: bytes) -> None:
        path = self.path(key)
        try:
            files.write(path, self.directory, blob)
        except FileNotFoundError:  # somebody removed the directory just now
            files.write(path, self.directory, blob)
        self._shrink()

    def __delitem__(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def clear(self) -> None:
        """Everything that this user may remove; then it says what else there was."""
        refusal = None
        for path in self.files():
            try:
                path.unlink(missing_ok=True)
            except PermissionError as e:
                refusal = refusal or e
        if refusal is not None:
            raise refusal

    def folders(self) -> Iterator[Path]:
        return self.directory.glob("[0-9a-f][0-9a-f]")

    def files(self, unfinished: bool = True) -> Iterator[Path]:
        """All files of this store, those of unfinished writes among them if wanted."""
        for folder in self.folders():
            try:
                names = list(folder.iterdir())
            except OSError:  # removed by another process, or nothing of ours
                continue
            for path in names:
                if len(path.name) == 62 or unfinished and path.name.startswith(files.TEMPORARY):
                    yield path

    def _shrink(self) -> None:
        found, now = [], time.time()
        for path in self.files():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was quicker
                continue
            if path.name.startswith(files.TEMPORARY):
                if now - status.st_mtime > _STALE_S:
                    self._make_room(path)
            else:
                found.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in found) - self.max_bytes
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            self._make_room(path)
            excess -= size

    @staticmethod
    def _make_room(path: Path) -> None:
        with suppress(PermissionError):  # another user's, in a directory that users share
            path.unlink(missing_ok=True)
