"""The image tower of an open_clip model: fixed batches of pixels in, unit vectors out.

Every forward pass has one shape, so an image's vector is the same bits whatever its batch
mates, its place in the batch and the rows that fill it up.
"""

import contextlib
import logging
import os
import queue
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub.utils.tqdm import disable_progress_bars
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.encoder.claim import wait_asleep
from pipeline.encoder.model import (
    CONFIG_FILE,
    HUB,
    LOCAL_DIR,
    Model,
    full_preprocess,
    pretrained_tags,
)
from pipeline.encoder.processor import NO_BF16, has_bf16
from pipeline.encoder.weights import NO_HUB_HINT, in_hub_cache, reach_hub
from pipeline.stage.command import log
from pipeline.stage.errors import DeviceError, ModelError

# Rows of a forward pass on a CPU, by layout. A ViT gains nothing from more, a convolutional net
# keeps its activations in the cores' caches (efficientnet-lite0: 4 rows 175 images/s, 16 rows 85).
CPU_ROWS = {torch.contiguous_format: 16, torch.channels_last: 4}
IN_FLIGHT = 2
Forward = Callable[[torch.Tensor], torch.Tensor]

# What torch says of a device that fails: what was expected, hint. The first that fits counts.
_DEVICE = [
    (r"driver on your system is too old", "an NVIDIA driver that this torch can use",
     "update the driver, or install a torch for it, or set device: cpu"),
    (r"no NVIDIA driver|CUDA driver version is insufficient|CUDA driver initialization failed",
     "a working NVIDIA driver", "nvidia-smi must list the GPU; or set device: cpu"),
    (r"no kernel image|not compatible with the current PyTorch",
     "a torch that is built for this GPU", "install another torch, or set device: cpu"),
    (r"CUDA.*out of memory|CUDA_ERROR_OUT_OF_MEMORY|ALLOC_FAILED|decoding JPEG images.*: 5\b",
     "memory on the GPU for a batch",
     "lower batch_size, or let fewer jobs share the GPU; nvidia-smi shows what is on it"),
    (r"can't allocate memory|not enough memory|bad_alloc|bad allocation", "memory for a batch",
     "lower batch_size, or give fewer --cores"),
    (r"decoding JPEG images|nvjpeg|nvJPEG|Failed to create", "a GPU that decodes JPEGs",
     "set decode: full, or scaled, which leave them to the cores"),
    (r"CUDA|CUBLAS|cuBLAS|CUDNN|cuDNN|NVRTC|NVML|HIP error", "a GPU that computes",
     "run it again: nothing that was encoded is lost; nvidia-smi and dmesg say more of the GPU"),
]  # fmt: skip


@contextlib.contextmanager
def device_errors(where: str = "") -> Iterator[None]:
    """Turn what torch raises about a GPU, its driver or memory into DeviceError, one line each."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        failure = _device_error(error, where)
        if failure is None:
            raise
        raise failure from error


def _device_error(error: Exception, where: str = "") -> DeviceError | None:
    """What an error says of the device; None where it is about something else."""
    text = "bad_alloc" if isinstance(error, MemoryError) else str(error)
    found = next((line for line in str(error).splitlines() if line.strip()), "none left")
    found = re.sub(r"\w+, /\S+:\d+, ", "", found)  # where in torchvision's source it was
    for pattern, expected, hint in _DEVICE:
        if re.search(pattern, text):
            return DeviceError(expected, found[:200].rstrip(". "), where, hint)
    return None


def probe(device: str) -> None:
    """Compute something tiny on a resolved device; DeviceError where that fails.

    A driver that is too old still counts its GPUs, and a GPU without kernels takes data: only a
    result shows that both will do.
    """
    with device_errors(device):
        ones = torch.ones(8, 8, device=device)
        torch.relu(ones @ ones).sum().item()


class _Lane:
    """A stream of one's own on a GPU, with the buffers of one batch and its forward pass.

    What two lanes do overlaps: one copies while the other computes. The pass is a CUDA graph, one
    launch instead of hundreds: at 96 rows a ViT-B/32 gains 1.6 times, being shorter than them.
    """

    def __init__(self, forward: Forward, shape: tuple[int, ...], device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                self._pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
                self._vectors = forward(self._pixels)  # chooses and loads what is recorded then
                self._stream.synchronize()
                self._pass = self._recorded(forward)
            self._photos = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
            self._result = torch.zeros(self._vectors.shape, pin_memory=True)

    def _recorded(self, forward: Forward) -> Callable[[], None]:
        """What computes the vectors of the pixels; if recorded, it does not know the encoder.

        So that the memory of an encoder is free as soon as nobody has it.
        """

        def compute() -> None:
            self._vectors = forward(self._pixels)

        graph = torch.cuda.CUDAGraph()
        try:
            # Photos may be decoded on this GPU meanwhile; what those threads do is no fault here.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                compute()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a tower that asks the CPU on its way cannot be recorded
            log.warning("each pass is slower, without a CUDA graph: %s", _short(error))
            torch.cuda.synchronize(self._device)
            return compute
        return graph.replay

    def encode(self, pixels: Sequence[torch.Tensor]) -> npt.NDArray[np.float32]:
        """The vectors of at most a batch; what the buffers held before stays behind its rows."""
        # The stream alone would leave a context on the first GPU, where this one is another.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            _fill(self._pixels, self._photos, pixels)
            self._pass()
            # A copy to memory that is not pinned would hold up the other lane's work in the driver.
            vectors = self._result[: len(pixels)]
            vectors.copy_(self._vectors[: len(pixels)], non_blocking=True)
            self._stream.synchronize()
            return vectors.numpy().copy()


def _fill(batch: torch.Tensor, pinned: torch.Tensor, pixels: Sequence[torch.Tensor]) -> None:
    """The photos into the first rows of a batch on a GPU: from there, or by way of `pinned`."""
    rows = len(pixels)
    on_gpu = sum(each.is_cuda for each in pixels)
    if on_gpu == rows:
        torch.stack(list(pixels), out=batch[:rows])
    elif on_gpu == 0:
        torch.stack(list(pixels), out=pinned[:rows])
        batch[:rows].copy_(pinned[:rows], non_blocking=True)
    else:
        for row, each in enumerate(pixels):
            batch[row].copy_(each, non_blocking=True)


class _OneDnnLinear(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Linear layers by oneDNN, for the block that it is entered for.

    torch gives float32 products to MKL, which on AMD's processors stops at AVX2: a ViT-B/32 is
    twice as fast this way there. bf16 goes to oneDNN in any case, and gains 7 % where the weights
    need not be reordered each time: they are kept a second time, in oneDNN's own order.
    """

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Only what lives as long as this: another tensor may come to lie where one has died.
        self._weights = {(weight.data_ptr(), weight.shape) for weight in tower.parameters()}
        self._reordered: dict[tuple[int, torch.Size], torch.Tensor] = {}

    @staticmethod
    def pays(layout: torch.memory_format, device: str, precision: str) -> bool:
        """Only for a net of linear layers; fp32 where torch would ask MKL, bf16 if it is fast."""
        if (device, layout) != ("cpu", torch.contiguous_format):
            return False
        mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return onednn and {"fp32": mkl, "bf16": has_bf16()}[precision]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.linear.default:
            return func(*args, **(kwargs or {}))
        features, weight, bias = (*args, None)[:3]
        key = weight.data_ptr(), weight.shape
        if key not in self._weights or not weight.is_contiguous():
            return func(*args)
        if key not in self._reordered:
            self._reordered[key] = torch.ops.mkldnn._reorder_linear_weight(weight)
        return torch.ops.mkldnn._linear_pointwise(
            features, self._reordered[key], bias, "none", [], ""
        )


class Encoder:
    """An image tower on a device. Any number of threads may call encode() at once.

    `dim` is the vectors' length, `size` the input's (height, width), `preprocess` open_clip's
    settings as plain values, `batch_rows` the rows of each forward pass.
    """

    def __init__(
        self,
        tower: torch.nn.Module,
        preprocess: dict[str, Any],
        device: str,
        precision: str,
        batch_rows: int,
    ) -> None:
        self.preprocess = preprocess
        self.size: tuple[int, int] = (preprocess["size"][0], preprocess["size"][1])
        self.batch_rows = batch_rows
        self._device = torch.device(device)
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[
            precision
        ]
        self._layout = _layout(tower)
        self._tower = tower.eval().to(self._device).to(memory_format=self._layout)
        self._mean = self._channels(preprocess["mean"])
        self._std = self._channels(preprocess["std"])
        self._shape = (batch_rows, 3, *self.size)
        self._linear: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        pays = _OneDnnLinear.pays(self._layout, device, precision)
        if pays:
            self._linear = _OneDnnLinear(tower)
        if pays or self._device.type == "cuda":
            # Linear layers and SDPA instead of one kernel, which on a CPU has MKL inside; on a GPU
            # it is these that were seen to give the same bits whatever the batch.
            torch.backends.mha.set_fastpath_enabled(False)
        self.dim = int(self._forward(self._blank().to(self._device)).shape[1])
        self._lanes: queue.SimpleQueue[_Lane] | None = None  # on a CPU no buffers are needed
        if self._device.type == "cuda":
            self._lanes = queue.SimpleQueue()
            for _ in range(IN_FLIGHT):
                self._lanes.put(_Lane(self._forward, self._shape, self._device))

    def encode(self, pixels: torch.Tensor | Sequence[torch.Tensor]) -> npt.NDArray[np.float32]:
        """Unit vectors, float32 (rows, dim), of photos as uint8 (3, height, width), RGB, stacked or
        not, on the CPU or the encoder's GPU.

        More than batch_rows are encoded in parts. A vector without direction (zero or not finite)
        is a row of NaN; the others are what they would be without it. On a GPU, IN_FLIGHT callers
        are served at once and others wait. Raises what torch raises; see device_errors.
        """
        parts = [
            self._part(list(pixels[start : start + self.batch_rows]))
            for start in range(0, len(pixels), self.batch_rows)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)

    def _part(self, pixels: list[torch.Tensor]) -> npt.NDArray[np.float32]:
        """The vectors of at most batch_rows photos, in one forward pass."""
        if self._lanes is None:
            batch = torch.zeros(self._shape, dtype=torch.uint8)
            torch.stack(pixels, out=batch[: len(pixels)])
            vectors: npt.NDArray[np.float32] = self._forward(batch)[: len(pixels)].numpy().copy()
            return vectors
        lane = self._lanes.get()
        try:
            return lane.encode(pixels)
        finally:
            self._lanes.put(lane)  # after a failure too: others wait for it

    def _forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit vectors (float32, on the device) of a full batch of uint8 pixels."""
        with torch.inference_mode(), self._linear:
            scaled = (pixels.to(torch.float32) / 255 - self._mean) / self._std
            output = self._tower(scaled.to(self._dtype).contiguous(memory_format=self._layout))
            features = output[0] if isinstance(output, tuple) else output
            return _unit(features.float())

    def _blank(self) -> torch.Tensor:
        return torch.zeros(self._shape, dtype=torch.uint8)

    def _channels(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device).view(1, 3, 1, 1)


def _cpu_rows(tower: torch.nn.Module, batch_size: int) -> int:
    """The best number up to `batch_size`, and always a power of two.

    MKL sums the last of 5 or 6 images in another order than the first, so that a vector would
    depend on its place; of 1, 2, 4, 8 and 16 it does not, on 1 to 16 threads.
    """
    rows = min(batch_size, CPU_ROWS[_layout(tower)])
    return 1 << (rows.bit_length() - 1)


def _unit(features: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    direction = torch.isfinite(norm) & (norm > torch.finfo(torch.float32).tiny)
    return torch.where(direction, features / norm, torch.nan)


def _layout(tower: torch.nn.Module) -> torch.memory_format:
    """Channels last for convolutional nets; a ViT's one convolution does not repay the copy."""
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in tower.modules())
    return torch.channels_last if convolutions > 4 else torch.contiguous_format


def load_encoder(
    model: Model, device: str, precision: str, threads: int, batch_size: int = 96
) -> Encoder:
    """The model's image tower on a resolved device in a resolved precision.

    `threads` is how many will call encode(), each with a core of its own: batches side by side
    wait for nobody, and the bits do not depend on the cores. `batch_size` is the rows of a forward
    pass at most.
    Weights that are not here are fetched from the hub. ModelError: they cannot be had or do not
    fit, or the model is not as its configuration says. DeviceError: the device does not compute,
    or there is no memory for the model and a batch.
    """
    torch.set_num_threads(1)
    # fp32 is asked for to be exact; torch would round the convolutions' factors to ten bits.
    torch.backends.cudnn.allow_tf32 = False
    wait_asleep(device)
    probe(device)
    clip, preprocess = load_clip(model, precision)
    rows = _cpu_rows(clip.visual, batch_size) if device == "cpu" else batch_size
    with device_errors(f"batch_size {batch_size}"):
        encoder = Encoder(clip.visual, preprocess, device, precision, rows)
    _check(model, encoder)
    _warn_of_activation(model)
    if (device, precision) == ("cpu", "bf16") and not has_bf16():
        log.warning("%s", NO_BF16)
    log.info(
        "encoder %s on %s, %s, weights %s",
        model.model_rev, _device_name(device, threads), precision, model.weights[:48],
    )  # fmt: skip
    return encoder


def load_clip(model: Model, precision: str = "fp32") -> tuple[Any, Any]:
    """The whole open_clip model on the CPU, and its preprocessing. ModelError as load_encoder.

    fp16 and bf16 are open_clip's mixed kinds, not the pure ones: the norm layers stay in float32,
    as in the original CLIP, which costs no time and keeps the residual stream's small numbers.
    """
    name, checkpoint = _located(model, _fetched(model))
    try:
        with quiet():
            clip = open_clip.create_model(
                name,
                pretrained=None if checkpoint is None else str(checkpoint),
                precision=precision,
                require_pretrained=True,
                force_preprocess_cfg=None if model.preprocess is None else dict(model.preprocess),
            )
    except Exception as error:
        # open_clip and torch raise all kinds, for what is otherwise always one of two mistakes
        raise _device_error(error, model.model_rev) or ModelError(
            f"weights that fit the architecture of {model.model_rev}",
            f"{type(error).__name__}: {_short(error)}",
            "",
            "model_name and pretrained must belong together, and the file be whole",
        ) from error
    config = clip.visual.preprocess_cfg
    return clip, full_preprocess(config, config["size"])


def _check(model: Model, encoder: Encoder) -> None:
    """What was loaded is what the database and the cache were checked against."""
    for field, expected, found in [
        ("embed_dim", model.embed_dim, encoder.dim),
        ("preprocess_cfg", model.preprocess, encoder.preprocess),
    ]:
        if expected is not None and expected != found:
            raise ModelError(
                f"{field} {expected}", str(found), model.model_rev, f"correct its {CONFIG_FILE}"
            )


def _warn_of_activation(model: Model) -> None:
    """Weights trained with QuickGELU load under a plain name too, and then encode worse."""
    tag = pretrained_tags().get(model.name, {}).get(model.pretrained, {})
    if tag.get("quick_gelu", False) and not open_clip.get_model_config(model.name).get(
        "quick_gelu"
    ):
        log.warning(
            "%s was trained with QuickGELU, which %s lacks; hint: model_name %s-quickgelu",
            model.pretrained, model.name, model.name,
        )  # fmt: skip


def _located(model: Model, hub_files: list[Path]) -> tuple[str, Path | None]:
    """The name and the weights file to give to open_clip, so that it needs no network."""
    if model.name.startswith(HUB):
        return f"{LOCAL_DIR}{hub_files[0].parent}", None
    if model.name.startswith(LOCAL_DIR):
        return model.name, None
    return model.name, model.checkpoint or hub_files[0]


def _fetched(model: Model) -> list[Path]:
    """The model's files from the hub, from its cache on this machine where they are there."""
    if model.checkpoint is not None:
        return []
    cached = in_hub_cache(model)
    if cached is not None:
        return cached
    reach_hub(model)
    repository, file = os.path.split(model.hub)
    log.info("downloading %s from %s, once", model.hub, hub_constants.ENDPOINT)
    disable_progress_bars()
    config = [CONFIG_FILE] if model.name.startswith(HUB) else []
    try:
        with quiet():
            return [
                Path(open_clip.pretrained.download_pretrained_from_hf(repository, filename=name))
                for name in [file or None, *config]
            ]
    except Exception as error:  # the hub's client has a dozen kinds, none of which is our doing
        raise ModelError(
            f"the weights {model.hub}", _short(error), hub_constants.ENDPOINT, NO_HUB_HINT
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, and open_clip's remarks to the root logger, out of the log.

    Without a handler there, its first remark would also install one that doubles all our lines.
    """
    nothing = logging.NullHandler()
    logging.getLogger().addHandler(nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().removeHandler(nothing)


def _device_name(device: str, threads: int) -> str:
    if device == "cpu":
        return f"cpu ({threads} threads)"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or "no message"
