"""Which encoder a job asks for: its identity and its place, known without importing torch.

This runs whenever Snakemake builds its DAG and in shards with nothing left to encode, so it
reads open_clip's tables as text: milliseconds instead of the seconds that the import takes.
"""

import __future__

import ast
import contextlib
import copy
import ctypes
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import re
import runpy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.encoder.processor import has_bf16
from pipeline.stage.errors import ModelError, SettingsError
from pipeline.stage.settings import Identity, Settings

if TYPE_CHECKING:
    from pipeline.encoder.projection import Projection

log = logging.getLogger("pipeline")

# Raise it when a photo's pixels change by this project's decoding or resizing: vectors that were
# remembered are then stale.
TRANSFORM_VERSION = 1

# Of a fingerprint: the rest, precision, decoding and orientation, moves a vector by little.
NEVER_MIXED = ("weights", "architecture", "transform")

LOCAL_DIR = "local-dir:"
HUB = "hf-hub:"
CONFIG_FILE = "open_clip_config.json"
HASHES = "weights.json"
# Of several weights files open_clip takes the first of these, else any safetensors, bin or pth.
WEIGHTS_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


@dataclass(frozen=True)
class Model:
    """An encoder as it is asked for, before anything is loaded.

    `weights` and `architecture` are its identity: two models that agree in both and in
    `preprocess` make the same vectors. `preprocess` has the keys of open_clip's PreprocessCfg
    with `size` as [height, width]; it and `embed_dim` are None where only the hub knows them.
    `checkpoint` (a local file) or `hub` ("owner/repository/file"; no file: the default one) says
    where the weights are; paths are in no other field but `name` and `pretrained`, which
    open_clip needs as they were given. `projection` is what comes after, in aggregate and for a
    query; encode knows none.
    """

    name: str
    pretrained: str
    weights: str
    architecture: str
    preprocess: dict[str, Any] | None
    embed_dim: int | None
    model_rev: str
    checkpoint: Path | None = None
    hub: str = ""
    projection: "Projection | None" = None

    @property
    def dimension(self) -> int | None:
        """Of the listings' vectors: `embed_dim`, unless they are projected."""
        return self.projection.dimensions if self.projection else self.embed_dim


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides an image's vector; equal fingerprints share one cache folder."""

    weights: str
    architecture: str
    transform: str
    precision: str
    decode: str
    apply_exif_orientation: bool

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for Parquet metadata."""
        return asdict(self)


def model_of(chosen: Settings) -> Model:
    """The configured model, its weights not loaded, with the projection of its vectors, if any.

    ModelError: there is no such model, no such projection, or it is of another encoder's vectors.
    """
    model = find_model(chosen.model_name, chosen.pretrained, remember=Path(chosen.cache_dir))
    if not chosen.pca:
        return model
    from pipeline.encoder.projection import read  # here: its imports are slower than this module

    projection = read(Path(chosen.pca))
    projection.check(planned_fingerprint(chosen, model).as_dict(), model.embed_dim)
    return replace(model, projection=projection)


def identity_of(chosen: Settings, model: Model) -> Identity:
    """The part of the target's key that the settings and their model decide."""
    identity = chosen.identity
    projected = model.projection.rev if model.projection else ""
    return identity._replace(
        model_rev=identity.model_rev or model.model_rev, pca_rev=identity.pca_rev or projected
    )


def key_of(chosen: Settings) -> Identity:
    """The same; the model and its projection are looked for only where the key needs them."""
    if chosen.model_rev and (chosen.pca_rev or not chosen.pca):
        return chosen.identity
    return identity_of(chosen, model_of(chosen))


def planned_fingerprint(chosen: Settings, model: Model) -> "Fingerprint":
    """What the settings ask for. Its precision may be auto: it is not resolved here."""
    return fingerprint(
        model,
        precision=chosen.precision,
        decode=chosen.decode,
        apply_exif_orientation=chosen.apply_exif_orientation,
    )


def find_model(model_name: str, pretrained: str, remember: Path | None = None) -> Model:
    """The model behind the two settings, from local files alone.

    A local weights file is read whole for its SHA-256, 1.7 GB a second at best: `remember` is a
    folder that keeps the result for as long as the file's size and mtime stay.
    ModelError: an unknown name or tag, or a local file that is missing or unreadable.
    """
    if model_name.startswith(LOCAL_DIR):
        return _local_model(model_name, remember)
    if model_name.startswith(HUB):
        return _hub_model(model_name)
    return _named_model(model_name, pretrained, remember)


def fingerprint(
    model: Model,
    *,
    precision: str,
    decode: str,
    apply_exif_orientation: bool,
    transform_version: int = TRANSFORM_VERSION,
) -> Fingerprint:
    """The identity of the vectors that `model` makes with these settings."""
    transform = {"preprocess": model.preprocess, "version": transform_version}
    return Fingerprint(
        weights=model.weights,
        architecture=model.architecture,
        transform=_digest(transform)[:16],
        precision=precision,
        decode=decode,
        apply_exif_orientation=apply_exif_orientation,
    )


def resolve_device(device: str) -> str:
    """The torch device for auto, cpu, cuda or cuda:N; SettingsError where there is no such GPU."""
    if device == "cpu":
        return device
    count = _cuda_devices()
    if device == "auto":
        return "cuda" if count else "cpu"
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise SettingsError("device: auto, cpu, cuda or cuda:N", repr(device))
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        found = f"{count} CUDA devices" if count else "no CUDA device, or a torch without CUDA"
        raise SettingsError(f"device {device}", found, "", "set device: cpu to encode without")
    return device


def gpus(device: str) -> int:
    """How many GPUs encodes with this setting may use at a time; 0 on a processor."""
    if device == "cpu":
        return 0
    return min(1, _cuda_devices()) if ":" in device else _cuda_devices()


def resolve_precision(precision: str, device: str) -> str:
    """fp32, fp16 or bf16 for a resolved device; auto is fp16 on CUDA, else fp32."""
    on_cpu = device == "cpu"
    if precision == "auto":
        return "fp32" if on_cpu else "fp16"
    if precision not in ("fp32", "fp16", "bf16"):
        raise SettingsError("precision: auto, fp32, fp16 or bf16", repr(precision))
    if precision == "fp16" and on_cpu:
        raise SettingsError("a CUDA device for precision fp16", "cpu", "", "fp32 or bf16")
    return precision


def fast_precisions(device: str) -> tuple[str, ...]:
    """Those that a resolved device has instructions for, the exact one first."""
    if device != "cpu":
        return ("fp32", "fp16", "bf16")
    return ("fp32", "bf16") if has_bf16() else ("fp32",)


def check_decode(decode: str, device: str) -> None:
    """SettingsError where a GPU is to decode and there is none."""
    if decode == "gpu" and device == "cpu":
        raise SettingsError("a CUDA device for decode gpu", "cpu", "", "full or scaled")


def full_preprocess(overlay: Mapping[str, Any], size: Any) -> dict[str, Any]:
    """Open_clip's default preprocessing under `overlay`; `size` is the image tower's input.

    Plain JSON values in one form, so that equal settings compare and hash as equal.
    """
    constants = open_clip_constants()
    values: dict[str, Any] = {
        "mode": "RGB",
        "mean": constants["OPENAI_DATASET_MEAN"],
        "std": constants["OPENAI_DATASET_STD"],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    values |= {k: v for k, v in overlay.items() if k in values and v is not None}
    for name in ("mean", "std"):
        channels = values[name]
        values[name] = (
            [float(v) for v in channels]
            if isinstance(channels, list | tuple)
            else [float(channels)] * 3
        )
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return values | {"size": [int(height), int(width)]}


def _local_model(model_name: str, remember: Path | None) -> Model:
    folder = Path(model_name.removeprefix(LOCAL_DIR))
    if not folder.is_dir():
        raise ModelError(
            "a model folder", "none", str(folder), f"it holds {CONFIG_FILE} and {WEIGHTS_FILES[0]}"
        )
    config = _read_json(folder / CONFIG_FILE)
    model_cfg = config.get("model_cfg")
    if not isinstance(model_cfg, dict):
        raise ModelError("model_cfg", "no such key", str(folder / CONFIG_FILE))
    checkpoint = _weights_in(folder)
    weights = _file_sha256(checkpoint, remember)
    return Model(
        name=model_name,
        pretrained="",
        weights=weights,
        architecture=_digest(model_cfg),
        preprocess=full_preprocess(config.get("preprocess_cfg") or {}, _image_size(model_cfg)),
        embed_dim=_embed_dim(model_cfg, folder / CONFIG_FILE),
        model_rev=f"{folder.resolve().name}/{weights[:12]}",
        checkpoint=checkpoint,
    )


def _hub_model(model_name: str) -> Model:
    repository = model_name.removeprefix(HUB)
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repository):
        raise ModelError("hf-hub:OWNER/REPOSITORY", repr(model_name))
    return Model(
        name=model_name,
        pretrained="",
        weights=model_name,
        architecture=_digest(model_name),
        preprocess=None,
        embed_dim=None,
        model_rev=model_name,
        hub=repository + "/",
    )


def _named_model(model_name: str, pretrained: str, remember: Path | None) -> Model:
    name = model_name.replace("/", "-")  # as open_clip does: ViT-B/32 is ViT-B-32
    config = _open_clip() / "model_configs" / f"{name}.json"
    if not config.is_file():
        raise _unknown_name(model_name)
    model_cfg = _read_json(config)
    tags = pretrained_tags().get(name, {})
    tag = pretrained.lower().replace("-", "_")
    known: dict[str, Any] = tags.get(tag, {})
    if known:
        checkpoint, weights, model_rev = None, f"{name}/{tag}", f"{model_name}/{pretrained}"
    elif pretrained and Path(pretrained).is_file():
        checkpoint = Path(pretrained)
        weights = _file_sha256(checkpoint, remember)
        model_rev = f"{model_name}/{checkpoint.stem}-{weights[:12]}"
    else:
        raise ModelError(
            f"a pretrained tag of {name}, or a weights file",
            repr(pretrained),
            "pretrained",
            f"one of {', '.join(tags)}" if tags else "open_clip has no weights for this model",
        )
    return Model(
        name=name,
        pretrained=tag if known else pretrained,
        weights=weights,
        architecture=_digest(model_cfg),
        preprocess=full_preprocess(known, _image_size(model_cfg)),
        embed_dim=_embed_dim(model_cfg, config),
        model_rev=model_rev,
        checkpoint=checkpoint,
        hub=known.get("hf_hub", ""),
    )


def _unknown_name(model_name: str) -> ModelError:
    names = [file.stem for file in (_open_clip() / "model_configs").glob("*.json")]
    close = difflib.get_close_matches(model_name, names, n=3, cutoff=0.4)
    return ModelError(
        "an open_clip model name, local-dir:FOLDER or hf-hub:OWNER/REPOSITORY",
        repr(model_name),
        "model_name",
        f"did you mean {', '.join(close)}?" if close else "",
    )


@functools.cache
def pretrained_tags() -> dict[str, dict[str, dict[str, Any]]]:
    """Open_clip's table of weights: model name, tag, then hf_hub, mean, std and so on.

    The table's module imports torch, so only its assignments and small functions are run; where
    another version of it does not take that, it is imported, which takes seconds.
    """
    try:
        tags = _tags_in(_open_clip() / "pretrained.py")
    except Exception as error:  # noqa: BLE001  another version may fail in any way
        log.debug("open_clip is imported for its tags: %s", error)
        tags = importlib.import_module("open_clip.pretrained")._PRETRAINED
    return dict(tags)


def _tags_in(module: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The table that the text of open_clip's module makes. Raises whatever that text raises."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    kept = (ast.Assign, ast.FunctionDef, ast.For, ast.If, ast.Expr)
    tree.body = [node for node in tree.body if isinstance(node, kept)]
    names: dict[str, Any] = {"copy": copy, **open_clip_constants()}
    flags = __future__.annotations.compiler_flag  # its annotations name what is not imported
    exec(compile(tree, str(module), "exec", flags), names)
    tags: dict[str, dict[str, dict[str, Any]]] = names["_PRETRAINED"]
    if not tags:
        raise ValueError("no tag in its table")
    return tags


@functools.cache
def open_clip_constants() -> dict[str, Any]:
    """What open_clip's constants.py says, without an import of open_clip."""
    try:
        return runpy.run_path(str(_open_clip() / "constants.py"))
    except Exception as error:  # noqa: BLE001  another version may fail in any way
        log.debug("open_clip is imported for its constants: %s", error)
        return vars(importlib.import_module("open_clip.constants"))


@functools.cache
def _open_clip() -> Path:
    """The folder of the installed package; looking it up does not import it."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ModelError("the package open_clip", "none", "", "pip install open_clip_torch")
    return Path(spec.origin).parent


def _weights_in(folder: Path) -> Path:
    present = [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]
    for pattern in ("*.safetensors", "*.bin", "*.pth"):
        present += sorted(folder.glob(pattern))
    if not present:
        raise ModelError("a weights file", "none", str(folder), f"such as {WEIGHTS_FILES[0]}")
    return present[0]


def _image_size(model_cfg: Mapping[str, Any]) -> Any:
    return model_cfg.get("vision_cfg", {}).get("image_size", 224)


def _embed_dim(model_cfg: Mapping[str, Any], where: Path) -> int:
    dim = model_cfg.get("embed_dim")
    if not isinstance(dim, int) or dim < 1:
        raise ModelError("embed_dim, a positive whole number", repr(dim), str(where))
    return dim


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("a model configuration", "no such file", str(path)) from None
    except (OSError, ValueError) as error:
        raise ModelError("readable JSON", str(error), str(path)) from None
    if not isinstance(document, dict):
        raise ModelError("a JSON object", type(document).__name__, str(path))
    return document


def _file_sha256(path: Path, remember: Path | None) -> str:
    try:
        stat = path.stat()
        key = _digest([str(path.absolute()), stat.st_size, stat.st_mtime_ns])
        known = _remembered(remember)
        if key not in known:
            with open(path, "rb") as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            _remember(remember, known)
    except OSError as error:
        raise ModelError("a readable weights file", str(error.strerror), str(path)) from None
    return known[key]


def _remembered(folder: Path | None) -> dict[str, str]:
    """Hashes by a digest of path, size and mtime; none where the file cannot be read."""
    try:
        return dict(json.loads((folder / HASHES).read_text())) if folder else {}
    except (OSError, ValueError, TypeError):
        return {}


def _remember(folder: Path | None, known: dict[str, str]) -> None:
    if folder is None:
        return
    from pipeline.stage.parquet import (
        write_json,  # here: its import is slower than all of this module
    )

    with contextlib.suppress(OSError):  # a read-only folder costs time, nothing else
        write_json(folder / HASHES, known)


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _cuda_devices() -> int:
    """How many GPUs this process may use; 0 with a torch that was built without CUDA.

    The driver itself is asked, since it honours CUDA_VISIBLE_DEVICES as torch does.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return 0
    version = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    if not re.search(r"^cuda\b[^=]*=\s*['\"]", version, re.MULTILINE):
        return 0
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
