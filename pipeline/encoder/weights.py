"""Whether a weights file is whole, told from its first and last kilobytes: no tensor is read."""

import json
import zipfile
from pathlib import Path

from pipeline.stage.errors import ModelError

_AGAIN = "the copy or download ended early: fetch the file again"
_LFS = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def check_whole(path: Path) -> None:
    """ModelError where a weights file is cut short, or is only a pointer to one.

    safetensors says in its header where the last tensor ends; a zip, PyTorch's form, ends with
    its table of contents. PyTorch's older form has no end to look for, and passes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_LFS))
    except OSError as error:
        raise ModelError("a readable weights file", str(error.strerror), str(path)) from None
    if start == _LFS:
        raise ModelError("a weights file", "git-lfs's pointer to one", str(path), "git lfs pull")
    if path.suffix == ".safetensors":
        expected = _safetensors_size(path, size)
        if expected != size:
            raise ModelError(f"{expected} bytes of weights", str(size), str(path), _AGAIN)
    elif not size or (start.startswith(_ZIP) and not zipfile.is_zipfile(path)):
        raise ModelError("a whole weights file", f"{size} bytes without end", str(path), _AGAIN)


def _safetensors_size(path: Path, size: int) -> int:
    """How long the file is to be: 8 bytes of length, the header, and the tensors."""
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(
                file.read(header_size) if header_size <= min(size, _LONGEST_HEADER) else b""
            )
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        return 8 + header_size + max(ends, default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise ModelError("a safetensors file", "no whole header", str(path), _AGAIN) from None
