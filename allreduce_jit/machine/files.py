"""Files of the cache directory: written whole or not at all, and read only where nobody else can have written them.

What is loaded from them runs on the GPU in this process. So a file counts only if it, its directory and every one from
there up to and including the cache directory belong to this user or to root, and no one else may write them (but for
sticky directories, in which others can neither replace nor remove what is ours). Whoever may write a directory above
can put another one in the place of the cache directory, but only one that is this user's or root's as well; and
home and project directories that a group may write are too common to refuse. A link has to belong to this user or to
root, and the file that it leads to and that file's directory are held to the same.

Each is opened first and then checked, from the cache directory down, so that what was checked is what is read.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

TEMPORARY = ".tmp-"
NO_DIRECTORY = "neither HOME nor the user database names a home directory: set ALLREDUCE_JIT_CACHE_DIR"
# What new files and directories may have at most; the umask takes its part away as always.
_FILE_MODE, _DIRECTORY_MODE = 0o644, 0o755
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_ITSELF = os.O_NOFOLLOW | os.O_CLOEXEC


class Untrusted(PermissionError):
    """Somebody else may have written it; the message says what to do."""


class _Link(Exception):
    """A step of the way is a link of somebody who may be trusted."""


def make_directory(path: Path) -> None:
    """Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)


def check_directory(top: Path) -> None:
    """Raises ``Untrusted`` or another ``OSError`` if nothing in the cache directory ``top`` would count."""
    with ExitStack() as opened:
        _walk(opened, top, ())


def read(path: Path, top: Path) -> bytes:
    """The bytes of a file below the cache directory ``top``. Raises ``Untrusted`` or another ``OSError``."""
    with ExitStack() as opened:
        try:
            here = _walk(opened, top, path.parent.relative_to(top).parts)
            file = _step(opened, here, path, os.O_RDONLY | os.O_NONBLOCK | _ITSELF)
        except _Link:
            target = Path(os.path.realpath(path, strict=True))  # there are no more links in it
            return read(target, target.parent)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(f"{path} is no file")
        with open(file, "rb", closefd=False) as stream:
            return stream.read()


def write(path: Path, top: Path, blob: bytes) -> None:
    """Put ``blob`` below the cache directory ``top``, whole or not at all; refused where ``read`` would refuse it."""
    for directory in (top, path.parent):
        make_directory(directory)
    with ExitStack() as opened:
        try:
            here = _walk(opened, top, path.parent.relative_to(top).parts)
        except _Link:
            folder = Path(os.path.realpath(path.parent, strict=True))
            return write(folder / path.name, folder, blob)
        temporary = f"{TEMPORARY}{secrets.token_hex(8)}"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _ITSELF, _FILE_MODE, dir_fd=here)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(blob)
            os.replace(temporary, path.name, src_dir_fd=here, dst_dir_fd=here)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                os.unlink(temporary, dir_fd=here)
            raise


def _walk(opened: ExitStack, top: Path, parts: tuple[str, ...]) -> int:
    """Open the directory ``parts`` below ``top``, each one on the way checked."""
    here, where = os.open(top, _DIRECTORY), top  # where ``top`` itself is a link, what it leads to is what counts
    opened.callback(os.close, here)
    _require(os.fstat(here), top)
    for name in parts:
        where = where / name
        here = _step(opened, here, where, _DIRECTORY | _ITSELF)
    return here


def _step(opened: ExitStack, here: int, where: Path, flags: int) -> int:
    """Open the last part of ``where`` in its directory ``here``."""
    status = os.stat(where.name, dir_fd=here, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        _require_owner(status, where)
        raise _Link
    descriptor = os.open(where.name, flags, dir_fd=here)
    opened.callback(os.close, descriptor)
    _require(os.fstat(descriptor), where)
    return descriptor


def _require(status: os.stat_result, where: Path) -> None:
    _require_owner(status, where)
    writers = [who for bit, who in ((stat.S_IWGRP, "its group"), (stat.S_IWOTH, "everybody")) if status.st_mode & bit]
    if writers and not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        recursively = "-R " if stat.S_ISDIR(status.st_mode) else ""
        raise Untrusted(f"{' and '.join(writers)} may write {where}: chmod {recursively}go-w {where}")


def _require_owner(status: os.stat_result, where: Path) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise Untrusted(
            f"{where} belongs to user {status.st_uid}, neither to this user ({os.geteuid()}) nor to root: "
            "set ALLREDUCE_JIT_CACHE_DIR to a directory of this user's"
        )
