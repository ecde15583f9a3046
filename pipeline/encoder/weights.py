"""Whether a model's weights are here, and whole, or can be fetched: no tensor is read.

Neither torch nor open_clip is loaded, which takes seconds.
"""

import contextlib
import json
import os
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub import try_to_load_from_cache

from pipeline.encoder.model import CONFIG_FILE, HUB, Model, open_clip_constants
from pipeline.stage.errors import ModelError

PROBE_S = 3.0
NO_HUB_HINT = (
    "where no hub is reachable, copy a model folder here and set model_name: local-dir:FOLDER"
)

_AGAIN = "the copy or download ended early: fetch the file again"
_LFS = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def weights_present(model: Model) -> None:
    """ModelError unless the weights are on this machine, and whole, or their hub answers."""
    cached = [model.checkpoint] if model.checkpoint is not None else in_hub_cache(model)
    if cached is None:
        reach_hub(model)
    else:
        check_whole(cached[0])


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


def in_hub_cache(model: Model) -> list[Path] | None:
    """The model's files in the hub's local cache; None unless all are there."""
    repository, file = os.path.split(model.hub)
    constants = open_clip_constants()
    wanted = file or constants["HF_WEIGHTS_NAME"]
    default = wanted == constants["HF_WEIGHTS_NAME"]
    safe = constants["HF_SAFE_WEIGHTS_NAME"] if default else f"{Path(wanted).stem}.safetensors"
    weights = [path for name in (safe, wanted) if (path := _in_cache(repository, name))]
    if not weights:
        return None
    if not model.name.startswith(HUB):
        return weights[:1]
    config = _in_cache(repository, CONFIG_FILE)
    return [weights[0], config] if config and config.parent == weights[0].parent else None


def _in_cache(repository: str, name: str) -> Path | None:
    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def reach_hub(model: Model) -> None:
    """ModelError within seconds unless the hub answers; its own client tries for a minute."""
    if hub_constants.HF_HUB_OFFLINE:
        found = "HF_HUB_OFFLINE is set, and they are not in its local cache"
    elif not _answers(hub_constants.ENDPOINT):
        found = f"no answer from {hub_constants.ENDPOINT}, and they are not in its local cache"
    else:
        return
    raise ModelError(f"the weights {model.hub}", found, model.model_rev, NO_HUB_HINT)


def _answers(url: str) -> bool:
    """Whether anything speaks HTTP there, through the proxy if the environment names one.

    A thread, since looking up a host's name heeds no timeout.
    """
    reached = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with contextlib.closing(urllib.request.urlopen(request, timeout=PROBE_S)):
                reached.set()
        except urllib.error.HTTPError:
            reached.set()  # a refusal is an answer too
        except (OSError, ValueError) as error:
            # certificates are the client's matter: it has its own, urllib may lack them
            if "CERTIFICATE" in str(error):
                reached.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_S + 1)
    return reached.is_set()
