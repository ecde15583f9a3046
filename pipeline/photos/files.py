"""Photos on disk: opened and read so that nothing a stranger named or left there can do harm.

Reads files under the image root only. Guarantees: never outside the root, never a wait on a FIFO,
never more bytes than allowed, never half of a file that is being written; a file system that fails
is no photo's error.
"""

import errno
import os
import re
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from pipeline.stage.errors import DataError, StorageError

T = TypeVar("T")

Reason = Literal["missing", "outside", "unreadable", "too-large", "broken"]

MESSAGE_LENGTH = 200
PATH_LENGTH = 4095  # bytes; Linux's PATH_MAX less the closing zero

_URL = re.compile(rb"(?i)[a-z][a-z0-9+.-]*://")

_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# O_PATH needs only search permission on a folder, as plain path resolution does.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# What an answer about this one path can be. All else (EIO, ESTALE, ETIMEDOUT, EMFILE, whatever a
# network file system thinks of) says nothing of the photo, which must not be remembered as bad.
_THE_PHOTOS_OWN = frozenset(
    {
        errno.ENOENT, errno.ENOTDIR,
        errno.EACCES, errno.EPERM,
        errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ,  # a name not to be had here
        errno.EISDIR, errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP,  # a socket, a device
        errno.EFBIG, errno.EOVERFLOW,
    }
)  # fmt: skip
STAT_THREADS = 16  # on network file systems a stat is a round trip
STAT_PATHS = 64  # that a thread takes at once
RETRY_S = (0.2, 1.0)  # pauses before the file system is asked again

# How errors begin that every photo has under a wrong image root, or one that may not be entered.
NOT_THERE = ("missing: ", *(
    f"unreadable: {os.strerror(number).lower()}" for number in (errno.EACCES, errno.EPERM)
))  # fmt: skip


class PhotoError(Exception):
    """One photo's own error; str() is '<reason>: <detail>', at most 200 printable characters.

    The text is the same each time for the same file and names no folder of this machine.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason: Reason = reason
        text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(f"{reason}: {detail}".split()))
        super().__init__(printable(text))


class FileStat(NamedTuple):
    """What tells one state of a photo from another.

    Of a file: bytes, and nanoseconds since 1970. Of an object: bytes, and 63 bits of its version.
    """

    size: int
    mtime_ns: int


def check_image_root(root: Path) -> tuple[int, int]:
    """Which folder the image root is, by device and inode; DataError where it can't be entered."""
    try:
        status = root.stat()
        found = "" if stat.S_ISDIR(status.st_mode) else "no folder"
        if not found and not os.access(root, os.X_OK):
            found = "one that may not be entered"
        if not found:
            return status.st_dev, status.st_ino
    except FileNotFoundError:
        found = "none"
    except OSError as error:
        found = _words(error)
    raise DataError(
        "a folder of images at IMAGE_ROOT_DIR",
        found,
        str(root),
        "export IMAGE_ROOT_DIR=/path/to/images",
    )


class Photos(ABC):
    """The image root. Every method may be called from any number of threads at once.

    A `storage_path` is relative to it, with '/' between its parts; empty parts and '.' count for
    nothing, and '..' is 'outside' even where it would lead back in.
    """

    root: Path | str
    max_bytes: int
    readers = 0  # threads that are worth having to fetch ahead; 0: who needs a photo reads it

    @abstractmethod
    def check(self) -> tuple[int, int]:
        """Which root it is now; DataError or StorageError: it can't be told what is missing."""

    @abstractmethod
    def stat(self, storage_path: str | None) -> FileStat:
        """The state of a photo that read() would read now; otherwise read()'s PhotoError.

        Raises StorageError where the file system or store fails, or descriptors run out.
        """

    @abstractmethod
    def read(
        self, storage_path: str | None, room: Callable[[int], None] = lambda size: None
    ) -> tuple[bytes, FileStat]:
        """A photo's bytes and the state that they belong to; PhotoError where there are none.

        A store waits for `room` for so many bytes before it sends them.
        One that changes while it is read is read once more, then it is 'unreadable'.
        Raises StorageError as stat() does.
        """

    def stats(self, storage_paths: Sequence[str | None]) -> Iterator[FileStat | PhotoError]:
        """stat() of each in turn, or its PhotoError; many at a time.

        Raises StorageError as stat() does; no other photo is asked for then.
        """
        failed: list[StorageError] = []

        def look(path: str | None) -> FileStat | PhotoError:
            if failed:
                raise failed[0]
            try:
                return self.stat(path)
            except PhotoError as error:
                return error
            except StorageError as error:
                failed.append(error)
                raise

        starts = range(0, len(storage_paths), STAT_PATHS)
        portions = [storage_paths[i : i + STAT_PATHS] for i in starts]
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            for found in pool.map(lambda some: [look(path) for path in some], portions):
                yield from found

    def has_any(self, storage_paths: Iterable[str | None]) -> bool:
        """Whether one at least of these names is taken, be it by a photo that can be read or not.

        Raises StorageError as stat() does.
        """
        return any(self._has(path) for path in storage_paths)

    def _has(self, storage_path: str | None) -> bool:
        try:
            self.stat(storage_path)
        except PhotoError as error:
            return not str(error).startswith(NOT_THERE)
        return True


class PhotoFolder(Photos):
    """A folder as the image root.

    `follow_symlinks=False`: a symlink at any step below the root is 'outside', wherever it points;
    the root itself may be one. `True`: links are followed wherever they lead, also out of the root.
    `max_bytes`: a larger file is 'too-large' and is not read. `pauses`: seconds before a file
    system that failed is asked again, once for each.
    """

    def __init__(
        self,
        root: Path,
        follow_symlinks: bool,
        max_bytes: int,
        pauses: tuple[float, ...] = RETRY_S,
    ) -> None:
        self.root: Path = Path(os.path.abspath(root))
        self._given = root  # as people know it
        self.follow_symlinks = follow_symlinks
        self.max_bytes = max_bytes
        self.pauses = pauses
        self._root = os.fsencode(self.root)

    def check(self) -> tuple[int, int]:
        """Which folder it is now, by device and inode; DataError: none that may be entered."""
        return check_image_root(self._given)

    def stat(self, storage_path: str | None) -> FileStat:
        """As of Photos."""
        return self._patiently(storage_path, self._stat)

    def read(
        self, storage_path: str | None, room: Callable[[int], None] = lambda size: None
    ) -> tuple[bytes, FileStat]:
        """As of Photos."""
        return self._patiently(storage_path, self._read)

    def _patiently(self, storage_path: str | None, look: Callable[[str | None], T]) -> T:
        """Look at a photo, more than once where it is the file system that fails."""
        for pause in self.pauses:
            try:
                return _photos_own(look, storage_path)
            except OSError:
                time.sleep(pause)
        try:
            return _photos_own(look, storage_path)
        except OSError as error:
            failed = error
        raise StorageError(
            "photos that can be read", _words(failed), printable(storage_path or ""),
            "run it again when the disk or network answers: nothing that was encoded is lost;"
            " a photo that fails each time can be moved away",
        )  # fmt: skip

    def _stat(self, storage_path: str | None) -> FileStat:
        with self._open(storage_path) as fd:
            return self._checked_stat(fd)

    def _read(self, storage_path: str | None) -> tuple[bytes, FileStat]:
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
        parts = parts_of(storage_path)
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


def parts_of(storage_path: str | None) -> list[bytes]:
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
    if _URL.match(path):
        raise PhotoError("outside", "the storage_path is a URL")
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


def _photos_own(look: Callable[[str | None], T], storage_path: str | None) -> T:
    """What `look` finds; the photo's own errors as PhotoError, a file system's as OSError."""
    try:
        return look(storage_path)
    except OSError as error:
        if error.errno not in _THE_PHOTOS_OWN:
            raise
        failed = error
    raise _photo_error(failed)


def _photo_error(error: OSError) -> PhotoError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return PhotoError("missing", "no such file")
    if error.errno == errno.ENAMETOOLONG:
        return PhotoError("outside", "the storage_path has too long a name")
    return PhotoError("unreadable", _words(error))


def _words(error: OSError) -> str:
    return "input/output error" if error.errno is None else os.strerror(error.errno).lower()


def printable(text: str) -> str:
    """At most 200 characters that cannot do anything to a terminal."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 1] + "…"


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")
