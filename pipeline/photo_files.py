"""Photos on disk: opened and read so that nothing a stranger named or left there can do harm.

Reads files under the image root only. Guarantees: never outside the root, never a wait on a FIFO,
never more bytes than allowed, never half of a file that is being written.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

Reason = Literal["missing", "outside", "unreadable", "too-large", "broken"]

MESSAGE_LENGTH = 200
PATH_LENGTH = 4095  # bytes; Linux's PATH_MAX less the closing zero

_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# O_PATH needs only search permission on a folder, as plain path resolution does.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# These are the process's own trouble: a photo must not be remembered as bad for them.
_NOT_THE_PHOTO = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class PhotoError(Exception):
    """One photo's own error; str() is '<reason>: <detail>', at most 200 printable characters.

    The text is the same each time for the same file and names no folder of this machine.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason: Reason = reason
        text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(f"{reason}: {detail}".split()))
        text = "".join(c if c.isprintable() else "?" for c in text)
        super().__init__(text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 1] + "…")


class FileStat(NamedTuple):
    """What tells one state of a file from another: bytes, and nanoseconds since 1970."""

    size: int
    mtime_ns: int


class PhotoFolder:
    """The image root. Every method may be called from any number of threads at once.

    `follow_symlinks=False`: a symlink at any step below the root is 'outside', wherever it points;
    the root itself may be one. `True`: links are followed wherever they lead, also out of the root.
    `max_bytes`: a larger file is 'too-large' and is not read.

    A `storage_path` is relative to the root, with '/' between its parts; empty parts and '.' count
    for nothing, and '..' is 'outside' even where it would lead back in.
    """

    def __init__(self, root: Path, follow_symlinks: bool, max_bytes: int) -> None:
        self.root = Path(os.path.abspath(root))
        self.follow_symlinks = follow_symlinks
        self.max_bytes = max_bytes
        self._root = os.fsencode(self.root)

    def stat(self, storage_path: str | None) -> FileStat:
        """The state of a file that read() would read now; otherwise read()'s PhotoError.

        Raises OSError only where the process has run out of descriptors or memory.
        """
        with _photo_errors(), self._open(storage_path) as fd:
            return self._checked_stat(fd)

    def read(self, storage_path: str | None) -> tuple[bytes, FileStat]:
        """A file's bytes and the state that they belong to; PhotoError where there are none.

        A file that changes while it is read is read once more, then it is 'unreadable'.
        Raises OSError only where the process has run out of descriptors or memory.
        """
        with _photo_errors():
            for _ in range(2):
                with self._open(storage_path) as fd:
                    before = self._checked_stat(fd)
                    data = _read_at_most(fd, before.size + 1)
                    if len(data) == before.size and self._checked_stat(fd) == before:
                        return data, before
            raise PhotoError("unreadable", "the file changed while it was read")

    def _checked_stat(self, fd: int) -> FileStat:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise PhotoError("unreadable", f"{_kind(status.st_mode)}, not a file")
        if status.st_size > self.max_bytes:
            raise PhotoError(
                "too-large", f"{status.st_size} bytes, more than the {self.max_bytes} allowed"
            )
        return FileStat(status.st_size, status.st_mtime_ns)

    @contextmanager
    def _open(self, storage_path: str | None) -> Iterator[int]:
        parts = _parts(storage_path)
        if self.follow_symlinks:
            fd = os.open(b"/".join([self._root, *parts]), _FILE)
        else:
            fd = self._open_below(parts)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open_below(self, parts: list[bytes]) -> int:
        """Open step by step, each relative to the folder before it, so that no race leads out."""
        # O_NOFOLLOW is about a path's last part only: the root may hold or be a symlink.
        parts = [b"/".join([self._root, *parts[:1]]), *parts[1:]]
        folder = None
        try:
            for part in parts[:-1]:
                inner = _open_step(part, _FOLDER, folder)
                if folder is not None:
                    os.close(folder)
                folder = inner
            return _open_step(parts[-1], _FILE | os.O_NOFOLLOW, folder)
        finally:
            if folder is not None:
                os.close(folder)


def _parts(storage_path: str | None) -> list[bytes]:
    """The steps from the root to the file; PhotoError where there is no safe way to go."""
    if storage_path is None:
        raise PhotoError("missing", "the row has no storage_path")
    if not storage_path:
        raise PhotoError("outside", "the storage_path is empty")
    if "\0" in storage_path:
        raise PhotoError("outside", "the storage_path holds a NUL")
    try:
        path = storage_path.encode()
    except UnicodeEncodeError:
        raise PhotoError("outside", "the storage_path is not UTF-8") from None
    if len(path) > PATH_LENGTH:
        raise PhotoError("outside", f"the storage_path is longer than {PATH_LENGTH} bytes")
    if path.startswith(b"/"):
        raise PhotoError("outside", "the storage_path is absolute")
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise PhotoError("outside", "the storage_path holds '..'")
    if not parts:
        raise PhotoError("unreadable", "a folder, not a file")
    return parts


def _open_step(part: bytes, flags: int, folder: int | None) -> int:
    try:
        return os.open(part, flags, dir_fd=folder)
    except OSError as error:
        # Linux answers ENOTDIR, not ELOOP, to a symlink where a folder was asked for.
        if error.errno == errno.ELOOP or (
            error.errno == errno.ENOTDIR and _is_symlink(part, folder)
        ):
            raise PhotoError("outside", "a symlink, and follow_symlinks is off") from None
        raise


def _is_symlink(part: bytes, folder: int | None) -> bool:
    try:
        return stat.S_ISLNK(os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _read_at_most(fd: int, limit: int) -> bytes:
    chunks = []
    while limit > 0 and (chunk := os.read(fd, limit)):
        chunks.append(chunk)
        limit -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


@contextmanager
def _photo_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NOT_THE_PHOTO:
            raise
        raise _photo_error(error) from None


def _photo_error(error: OSError) -> PhotoError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return PhotoError("missing", "no such file")
    if error.errno == errno.ENAMETOOLONG:
        return PhotoError("outside", "the storage_path has too long a name")
    if error.errno is None:
        return PhotoError("unreadable", "input/output error")
    return PhotoError("unreadable", os.strerror(error.errno).lower())


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")
