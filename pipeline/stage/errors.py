"""The errors that a user can mend. Each prints as one line: expected, found, where, hint."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

# What a file system refuses: what was expected, hint.
_STORAGE = {
    errno.ENOSPC: ("free space", "make room, then run it again"),
    errno.EDQUOT: ("free space within the quota", "make room, then run it again"),
    errno.EROFS: ("a file system that can be written", "mount it read-write, or work elsewhere"),
    errno.EACCES: ("permission to read and write", "see the owner and mode of file and folder"),
    errno.EPERM: ("permission to read and write", "see the owner and mode of file and folder"),
    errno.ENOTDIR: ("a folder", "a file is in its place: move it, or name another folder"),
    errno.EEXIST: ("a folder", "a file is in its place: move it, or name another folder"),
}


class PipelineError(Exception):
    """Something that the user can mend; shown as one line, never with a traceback."""

    def __init__(self, expected: str, found: str, where: str = "", hint: str = "") -> None:
        line = f"expected {expected}, found {found}"
        if where:
            line += f" ({where})"
        if hint:
            line += f"; hint: {hint}"
        super().__init__(" ".join(line.split()))


class SettingsError(PipelineError):
    """A key of config.yaml, an environment variable or a flag has a bad value."""


class DatabaseError(PipelineError):
    """The database, one of its tables or a privilege is not as the job needs it."""


class DatabaseUnreachable(DatabaseError):
    """Nothing answers at PG_DSN; the same call may succeed later."""


class DatabaseBusy(DatabaseError):
    """Another transaction came first, and this one was rolled back; it may succeed next time."""


class ModelError(PipelineError):
    """The model, its weights or its dimension is not as the job needs it."""


class DeviceError(PipelineError):
    """The GPU or its driver does not compute, or there is no memory for the model or a batch."""


class DataError(PipelineError):
    """An intermediate file does not hold what its stage promises."""


class StorageError(PipelineError):
    """A disk is full, or a file or folder may not be read or written."""


class WrongImageRoot(PipelineError):
    """Most photos are missing that were there before, or all: nothing was encoded of what is."""


class MixedVectors(PipelineError):
    """The table would hold vectors of two encoders or recipes under one key."""


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn the errors of a file system that a user can mend into StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        expected, hint = _STORAGE[error.errno]
        where = os.fsdecode(error.filename or "")
        raise StorageError(expected, os.strerror(error.errno).lower(), where, hint) from None
