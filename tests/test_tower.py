"""The model's identity, and vectors that are the same bits whatever is encoded beside them."""

import contextlib
import gc
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file

from pipeline.encoder import model as model_module
from pipeline.encoder import processor, weights
from pipeline.encoder import tower as encoder_module
from pipeline.encoder.model import (
    Fingerprint,
    find_model,
    fingerprint,
    pretrained_tags,
    resolve_device,
    resolve_precision,
)
from pipeline.encoder.tower import (
    Encoder,
    device_errors,
    load_encoder,
    probe,
)
from pipeline.encoder.weights import weights_present
from pipeline.stage.errors import DeviceError, ModelError, SettingsError

TEXT = {"context_length": 8, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "conv": {
        "image_size": 64,
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
}
DIM = 24


def write_model(folder: Path, kind: str = "vit", **changes: Any) -> str:
    """A small model with random weights from a fixed seed, as `local-dir:FOLDER`."""
    folder.mkdir(parents=True)
    model_cfg = {"embed_dim": DIM, "vision_cfg": VISION[kind], "text_cfg": TEXT}
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3, **changes}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = open_clip.CLIP(DIM, dict(VISION[kind]), dict(TEXT)).state_dict()
    save_file(
        {k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors"
    )
    return f"local-dir:{folder}"


def load(name: str, precision: str = "fp32", batch_size: int = 8, device: str = "cpu") -> Encoder:
    return load_encoder(find_model(name, ""), device, precision, 2, batch_size)


def photos(encoder: Encoder, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 3, *encoder.size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def conv(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "conv", "conv")


# Identity


def test_identity_imports_no_torch() -> None:
    """Finding the default model and resolving the device load neither torch nor open_clip."""
    code = (
        "import sys\n"
        "from pipeline.encoder.model import find_model, fingerprint, resolve_device\n"
        "fingerprint(find_model('ViT-B-32', 'laion2b_s34b_b79k'), precision='fp32',"
        " decode='full', apply_exif_orientation=True, transform_version=1)\n"
        "resolve_device('auto')\n"
        "print(*{'torch', 'open_clip', 'huggingface_hub', 'pyarrow'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == ""


def test_tags_are_open_clips_own() -> None:
    """The table read without an import is the one that the import gives."""
    assert pretrained_tags() == open_clip.pretrained._PRETRAINED
    assert all(c["hf_hub"] for tags in pretrained_tags().values() for c in tags.values())


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("pretrained.py", "_PRETRAINED = _built_by_a_function_that_is_not_here()"),
        ("pretrained.py", "TAGS = {}"),
        ("pretrained.py", "_PRETRAINED = {}"),
        ("pretrained.py", "def half("),
        ("pretrained.py", None),
        ("constants.py", "raise RuntimeError"),
        ("constants.py", None),
    ],
)
def test_another_version_of_open_clip_is_imported(
    file: str, text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the text of its table cannot be run, the model is found all the same."""
    expected = find_model("ViT-B-32", "laion2b_s34b_b79k"), pretrained_tags()
    installed = Path(open_clip.__file__).parent
    (tmp_path / "model_configs").symlink_to(installed / "model_configs")
    for name in {"pretrained.py", "constants.py"} - {file}:
        (tmp_path / name).symlink_to(installed / name)
    if text is not None:
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(model_module, "_open_clip", lambda: tmp_path)
    for cached in (model_module.pretrained_tags, model_module.open_clip_constants):
        cached.cache_clear()
    try:
        found = find_model("ViT-B-32", "laion2b_s34b_b79k"), pretrained_tags()
    finally:
        for cached in (model_module.pretrained_tags, model_module.open_clip_constants):
            cached.cache_clear()

    assert expected == found


def test_default_model() -> None:
    """The default model's identity is its name and tag, and open_clip's preprocessing."""
    model = find_model("ViT-B-32", "laion2b_s34b_b79k")

    assert model.weights == model.model_rev == "ViT-B-32/laion2b_s34b_b79k"
    assert model.embed_dim == 512
    assert model.preprocess == {
        "size": [224, 224],
        "mode": "RGB",
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    assert find_model("ViT-B/32", "laion2b-s34b-b79k").weights == model.weights


def test_tags_bring_their_own_preprocessing() -> None:
    """SigLIP squashes photos to its size, with its own mean."""
    preprocess = find_model("ViT-B-16-SigLIP", "webli").preprocess

    assert preprocess is not None
    assert (preprocess["resize_mode"], preprocess["mean"]) == ("squash", [0.5, 0.5, 0.5])


def test_a_folder_is_known_by_its_weights(vit: str, tmp_path: Path) -> None:
    """A copied folder is the same model; its revision is its name and hash, never its path."""
    model = find_model(vit, "ignored")
    copy = find_model(write_model(tmp_path / "copy"), "")
    made = fingerprint(
        model, precision="fp32", decode="full", apply_exif_orientation=True, transform_version=1
    )

    assert (copy.weights, copy.architecture) == (model.weights, model.architecture)
    assert model.model_rev == f"tiny/{model.weights[:12]}"
    assert model.embed_dim == DIM
    assert model.preprocess is not None
    assert model.preprocess["size"] == [32, 32]
    assert "/" not in json.dumps(made.as_dict())


def test_a_weights_file_is_known_by_its_hash(vit: str) -> None:
    """A file in place of a tag: its stem and hash, never its folder."""
    file = Path(vit.removeprefix("local-dir:")) / "open_clip_model.safetensors"
    model = find_model("ViT-B-32", str(file))

    assert model.weights == find_model(vit, "").weights
    assert model.model_rev == f"ViT-B-32/open_clip_model-{model.weights[:12]}"


def test_hash_is_remembered_until_the_file_changes(vit: str, tmp_path: Path) -> None:
    """The remembered hash is used for the same file, and its file holds no path."""
    name = write_model(tmp_path / "m")
    file = tmp_path / "m" / "open_clip_model.safetensors"
    first = find_model(name, "", remember=tmp_path)
    remembered = tmp_path / model_module.HASHES
    remembered.write_text(remembered.read_text().replace(first.weights, "0" * 64))
    again = find_model(name, "", remember=tmp_path)
    os.utime(file, ns=(1, 1))
    changed = find_model(name, "", remember=tmp_path)

    assert again.weights == "0" * 64
    assert changed.weights == first.weights == find_model(vit, "").weights
    assert "/" not in remembered.read_text()


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-23", "openai", "found 'ViT-B-23' (model_name); hint: did you mean ViT-B-32"),
        ("ViT-B-32", "laion3b", "found 'laion3b' (pretrained); hint: one of openai, "),
        ("ViT-B-32", "", "found '' (pretrained)"),
        ("local-dir:/no/such", "", "expected a model folder, found none (/no/such)"),
        ("hf-hub:", "", "expected hf-hub:OWNER/REPOSITORY"),
    ],
)
def test_unknown_models_are_one_line(name: str, pretrained: str, message: str) -> None:
    """A wrong name or tag is named, with what would be right."""
    with pytest.raises(ModelError) as error:
        find_model(name, pretrained)

    assert message in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("open_clip_config.json", None, "expected a model configuration, found no such file"),
        ("open_clip_config.json", "{", "expected readable JSON"),
        ("open_clip_config.json", "{}", "expected model_cfg, found no such key"),
        ("open_clip_config.json", '{"model_cfg": {}}', "expected embed_dim"),
        ("open_clip_model.safetensors", None, "expected a weights file, found none"),
    ],
)
def test_incomplete_folders_are_one_line(
    tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    """A folder without its configuration or weights says which is missing."""
    name = write_model(tmp_path / "m")
    (tmp_path / "m" / file).unlink()
    if content is not None:
        (tmp_path / "m" / file).write_text(content)

    with pytest.raises(ModelError, match=message):
        find_model(name, "")


def test_every_setting_that_changes_vectors_has_its_own_folder(vit: str, tmp_path: Path) -> None:
    """One cache folder per precision, decoding, orientation, transform, preprocessing."""
    model = find_model(vit, "")
    base: dict[str, Any] = {
        "precision": "fp32",
        "decode": "full",
        "apply_exif_orientation": True,
        "transform_version": 1,
    }
    other = find_model(write_model(tmp_path / "m", std=[0.5] * 3), "")
    made = [
        fingerprint(model, **base),
        fingerprint(model, **{**base, "precision": "fp16"}),
        fingerprint(model, **{**base, "decode": "scaled"}),
        fingerprint(model, **{**base, "apply_exif_orientation": False}),
        fingerprint(model, **{**base, "transform_version": 2}),
        fingerprint(other, **base),
    ]

    assert len(set(made)) == len(made)
    assert Fingerprint(**made[0].as_dict()) == made[0]


def test_device_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto takes a GPU and fp16 where there is one; what is not there is refused."""
    monkeypatch.setattr(model_module, "_cuda_devices", lambda: 2)
    assert [resolve_device(d) for d in ("auto", "cpu", "cuda", "cuda:1")] == [
        "cuda", "cpu", "cuda", "cuda:1",
    ]  # fmt: skip
    assert [resolve_precision("auto", d) for d in ("cpu", "cuda:1")] == ["fp32", "fp16"]
    with pytest.raises(SettingsError, match="expected device cuda:2, found 2 CUDA devices"):
        resolve_device("cuda:2")
    with pytest.raises(SettingsError, match="hint: fp32 or bf16"):
        resolve_precision("fp16", "cpu")
    monkeypatch.setattr(model_module, "_cuda_devices", lambda: 0)

    assert resolve_device("auto") == "cpu"
    with pytest.raises(SettingsError, match="no CUDA device"):
        resolve_device("cuda")


def test_cuda_is_seen_as_torch_sees_it() -> None:
    """The driver asked directly counts the devices that torch counts."""
    assert model_module._cuda_devices() == torch.cuda.device_count()


# Encoding


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["vit", "conv"])
def test_a_vector_does_not_depend_on_its_batch(
    kind: str, precision: str, request: pytest.FixtureRequest
) -> None:
    """Alone, among others, in any place, and whatever fills the batch up: the same bits."""
    encoder = load(request.getfixturevalue(kind), precision)
    batch = photos(encoder, 11)
    vectors = encoder.encode(batch)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))

    assert encoder.encode(batch[order]).tobytes() == vectors[order.numpy()].tobytes()
    for row in (0, 7):
        assert encoder.encode(batch[row : row + 1]).tobytes() == vectors[row].tobytes()
    filled = torch.cat([batch[:2], photos(encoder, encoder.batch_rows - 2, seed=5)])
    assert encoder.encode(filled)[:2].tobytes() == vectors[:2].tobytes()
    assert encoder.encode(list(batch)).tobytes() == vectors.tobytes()


@pytest.mark.parametrize("kind", ["vit", "conv"])
def test_vectors_are_open_clips(kind: str, request: pytest.FixtureRequest) -> None:
    """Unit vectors in float32, equal to those of open_clip's own model and normalisation."""
    name = request.getfixturevalue(kind)
    encoder = load(name)
    batch = photos(encoder, 5)
    clip = open_clip.create_model(name).eval()
    mean, std = (torch.tensor(encoder.preprocess[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        expected = clip.encode_image((batch / 255 - mean) / std, normalize=True).numpy()
    vectors = encoder.encode(batch)

    assert (str(vectors.dtype), vectors.shape) == ("float32", (5, DIM))
    assert encoder.dim == DIM
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("precision", "least"), [("fp32", 0.99999), ("fp16", 0.999), ("bf16", 0.99)]
)
@pytest.mark.parametrize("kind", ["vit", "conv"])
def test_a_gpu_points_the_same_way(
    kind: str, precision: str, least: float, request: pytest.FixtureRequest
) -> None:
    """More threads than buffers: each vector is that photo's, as close as the precision allows."""
    name = request.getfixturevalue(kind)
    exact, rounded = load(name), load(name, precision, device="cuda")
    batches = [photos(exact, 11, seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for batch, vectors in zip(batches, pool.map(rounded.encode, batches), strict=True):
            assert least < np.einsum("ij,ij->i", vectors, exact.encode(batch)).min()


@pytest.mark.parametrize("kind", ["vit", "conv"])
def test_bf16_is_close(kind: str, request: pytest.FixtureRequest) -> None:
    """bf16 on the CPU points the same way, within its eight bits."""
    name = request.getfixturevalue(kind)
    exact, rounded = load(name), load(name, "bf16")
    batch = photos(exact, 4)

    cosines = (exact.encode(batch) * rounded.encode(batch)).sum(1)
    assert 0.999 < cosines.min() < 1


def test_bf16_without_instructions_works_and_says_so_once(
    vit: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A precision that was asked for is used; one line says that it is the slower one."""
    monkeypatch.setattr(encoder_module, "has_bf16", lambda: False)
    exact, rounded = load(vit), load(vit, "bf16")
    batch = photos(exact, 4)
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    assert [processor.NO_BF16] == warned
    assert 0.999 < (exact.encode(batch) * rounded.encode(batch)).sum(1).min()


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16\n" * 2, True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("Features\t: fp asimd sve i8mm bf16\n", True),
        ("Features\t: fp asimd bf16\n\nFeatures\t: fp asimd\n", False),
        ("Features\t: fp asimd\n", False),
        ("bugs\t\t: avx512_bf16\n", False),
        (None, False),
    ],
)
def test_the_kernel_says_what_the_processor_can(
    cpuinfo: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 counts where every core has it, of x86 or ARM; where there is no list, none has."""
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)

    assert expected == processor.has_bf16.__wrapped__()
    assert processor.cpu_name()


@pytest.mark.parametrize(
    "bad",
    [
        [0.0, 0.0],
        [1e-40, 0.0],
        [float("nan"), 4.0],
        [float("inf"), 4.0],
        [4.0, -float("inf")],
        [3e38, 3e38],
    ],
    ids=str,
)
def test_a_vector_without_direction_is_a_row_of_nan(bad: list[float]) -> None:
    """Zero, NaN, infinity and a length beyond float32 are all NaN; other rows are untouched."""

    class Tower(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            dark = pixels[:, 0, 0, :1] == 0
            return torch.where(dark, torch.tensor([bad]), torch.tensor([[3.0, 4.0]]))

    preprocess = {"size": [2, 2], "mean": [0.0] * 3, "std": [1.0] * 3}
    encoder = Encoder(Tower(), preprocess, "cpu", "fp32", 4)
    batch = torch.full((3, 3, 2, 2), 255, dtype=torch.uint8)
    batch[1] = 0
    vectors = encoder.encode(batch)

    assert np.isnan(vectors[1]).all()
    np.testing.assert_allclose(vectors[[0, 2]], [[0.6, 0.8]] * 2, rtol=1e-6)


def test_no_photos_give_no_vectors(vit: str) -> None:
    """An empty batch is no forward pass."""
    encoder = load(vit)

    assert encoder.encode(photos(encoder, 0)).shape == (0, DIM)


# Devices that fail


class Gpu(encoder_module._Lane):
    """A stand-in: work is queued on a thread of its own, takes a while, and fails a few times."""

    def __init__(self, forward: Any, rows: int, error: Exception, times: int) -> None:
        self.forward, self.rows, self.error, self.times = forward, rows, error, times
        self.stream = ThreadPoolExecutor(1)
        self.busy, self.most = 0, 0

    def encode(self, pixels: Sequence[torch.Tensor]) -> Any:
        self.busy += 1
        self.most = max(self.most, self.busy)
        try:
            return self.stream.submit(self._compute, pixels).result()
        finally:
            self.busy -= 1

    def _compute(self, pixels: Sequence[torch.Tensor]) -> Any:
        time.sleep(0.01)
        self.times -= 1
        if self.times >= 0:
            raise self.error
        batch = torch.zeros((self.rows, *pixels[0].shape), dtype=torch.uint8)
        batch[: len(pixels)] = torch.stack(list(pixels))
        return self.forward(batch)[: len(pixels)].numpy()


def on_stand_in(encoder: Encoder, error: Exception, times: int) -> list[Gpu]:
    """Let the encoder work on two lanes of a stand-in for a GPU."""
    lanes = [Gpu(encoder._forward, encoder.batch_rows, error, times) for _ in range(2)]
    encoder._lanes = queue.SimpleQueue()
    for lane in lanes:
        encoder._lanes.put(lane)
    return lanes


@pytest.mark.timeout(60)
def test_a_failed_batch_gives_its_lane_back(vit: str) -> None:
    """However many batches fail, the next ones are not left waiting for a lane."""
    encoder, exact = load(vit), load(vit)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    on_stand_in(encoder, error, times=3)
    batch = photos(encoder, encoder.batch_rows)
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(encoder.encode, batch) for _ in range(20)]
    failed = [future for future in done if future.exception()]

    assert len(failed) == 6
    assert {error} == {future.exception() for future in failed}
    assert encoder.encode(batch).tobytes() == exact.encode(batch).tobytes()


@pytest.mark.timeout(60)
def test_batches_on_two_lanes_come_back_to_their_callers(vit: str) -> None:
    """Two batches are on the GPU at a time, one a lane, and each caller has its own vectors."""
    encoder, exact = load(vit), load(vit)
    lanes = on_stand_in(encoder, RuntimeError(), times=0)
    batches = [photos(encoder, 1 + seed % 11, seed) for seed in range(24)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(encoder.encode, batches))

    assert [exact.encode(b).tobytes() for b in batches] == [v.tobytes() for v in found]
    assert [1, 1] == [lane.most for lane in lanes]


class Stream:
    """Work that is done at once."""

    def __init__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Graph:
    """A recording that computes nothing: what it would be is for a GPU to say."""

    def replay(self) -> None:
        pass


def lane_here(monkeypatch: pytest.MonkeyPatch, encoder: Encoder, error: Exception | None) -> Any:
    """A real lane in the processor's memory, whose pass is recorded, or cannot be."""

    @contextlib.contextmanager
    def record(*_: Any, **how: Any) -> Iterator[None]:
        assert "thread_local" == how["capture_error_mode"]
        yield
        if error is not None:
            raise error

    def zeros(*shape: Any, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        return torch.empty(*shape, **how).zero_()

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    return encoder_module._Lane(encoder._forward, encoder._shape, torch.device("cpu"))


def test_a_tower_that_cannot_be_recorded_computes_each_pass(
    vit: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is slower, says the log; the vectors are the same, and each caller's own."""
    encoder = load(vit)
    lane = lane_here(monkeypatch, encoder, RuntimeError("operation not permitted\nwhen capturing"))
    batches = [photos(encoder, rows, seed=rows) for rows in (8, 3)]
    found = [lane.encode(list(batch)) for batch in batches]

    assert [encoder.encode(batch).tobytes() for batch in batches] == [v.tobytes() for v in found]
    assert "slower, without a CUDA graph: operation not permitted when capturing" in caplog.text


def test_the_memory_of_an_encoder_that_nobody_has_is_free(
    vit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: a collection of garbage may come after the next encoder finds no memory."""
    encoder = load(vit)
    encoder._lanes = queue.SimpleQueue()
    encoder._lanes.put(lane_here(monkeypatch, encoder, None))
    gone = weakref.ref(encoder)
    gc.disable()
    try:
        del encoder
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("devices", ["cc", "gg", "cgc"])
def test_a_batch_is_filled_from_cpu_and_gpu(devices: str) -> None:
    """Photos from either side are in their rows, and the rows behind them are left alone."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    pixels = [torch.full((3, 2, 2), row + 1, dtype=torch.uint8) for row in range(len(devices))]
    given = [
        p.as_subclass(OnGpu) if side == "g" else p for p, side in zip(pixels, devices, strict=True)
    ]
    batch, pinned = (torch.full((4, 3, 2, 2), 9, dtype=torch.uint8) for _ in range(2))
    encoder_module._fill(batch, pinned, given)

    assert [*range(1, len(devices) + 1), 9, 9][:4] == batch[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "expected memory on the GPU for a batch, found CUDA out of memory. Tried to allocate"
            " 2.00 GiB. GPU 0 has (batch_size 96); hint: lower batch_size, or let fewer jobs"
            " share the GPU; nvidia-smi shows what is on it",
        ),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous"),
            "expected memory on the GPU for a batch, found CUDA error: out of memory (batch_size",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
            "expected memory on the GPU for a batch, found CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (
            RuntimeError(
                "CUDA error: no kernel image is available for execution on the device\nCUDA kernel"
            ),
            "expected a torch that is built for this GPU, found CUDA error: no kernel image is"
            " available for execution on the device (batch_size 96); hint: install another torch,"
            " or set device: cpu",
        ),
        (
            RuntimeError(
                "The NVIDIA driver on your system is too old (found version 11040). Please update"
            ),
            "expected an NVIDIA driver that this torch can use, found The NVIDIA driver on your"
            " system is too old (found version 11040). Please update (batch_size 96); hint: update",
        ),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered"),
            "expected a GPU that computes, found CUDA error: an illegal memory access was"
            " encountered (batch_size 96); hint: run it again: nothing that was encoded is lost",
        ),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
            "expected a GPU that computes, found cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        ),
        *(
            (
                RuntimeError(f"decode_jpegs, /a/b.cpp:9, Error while decoding JPEG images: {e}"),
                "expected memory on the GPU for a batch, found Error while decoding JPEG images:"
                f" {e} (batch_size 96); hint: lower batch_size, or let fewer",
            )
            for e in ("Failed to decode batch: 5", "CUDA out of memory")
        ),
        (
            RuntimeError("Failed to initialize nvjpeg with hardware backend: 6\nException raised"),
            "expected a GPU that decodes JPEGs, found Failed to initialize nvjpeg with hardware"
            " backend: 6 (batch_size 96); hint: set decode: full",
        ),
        (
            RuntimeError("Failed to create pinned buffer: 6"),
            "expected a GPU that decodes JPEGs, found Failed to create pinned buffer: 6 (batch",
        ),
        (
            RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support"),
            "expected a GPU that decodes JPEGs, found decode_jpegs_cuda: torchvision not compiled",
        ),
        (MemoryError(), "expected memory for a batch, found none left (batch_size 96); hint:"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_what_a_device_says_is_one_line(error: Exception, message: str) -> None:
    """What was expected, what torch found, the batch size, and what to do."""
    with pytest.raises(DeviceError) as failure, device_errors("batch_size 96"):
        raise error

    assert str(failure.value).startswith(message)
    assert "\n" not in str(failure.value)


def test_memory_that_is_really_not_there_is_one_line() -> None:
    """Torch's own words for a CPU without memory are known."""
    with (
        pytest.raises(DeviceError, match="expected memory for a batch, found .*allocate"),
        device_errors(),
    ):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_stay_what_they_are() -> None:
    """A fault of the program is no fault of the device."""
    with pytest.raises(RuntimeError, match="Expected all tensors"), device_errors():
        raise RuntimeError("Expected all tensors to be on the same device")


def test_the_probe_computes(vit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that computes passes; one that only counts ends the loading before the weights."""
    probe("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="expected a working NVIDIA driver, found Found no"):
            probe("cuda")
    monkeypatch.setattr(torch, "relu", _raise_no_kernel)
    monkeypatch.setattr(encoder_module, "load_clip", lambda *_: pytest.fail("weights were loaded"))

    with pytest.raises(DeviceError, match=r"expected a torch that is built for this GPU.*\(cpu\)"):
        load(vit)


def _raise_no_kernel(*_: Any) -> None:
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def test_no_memory_for_the_model_is_no_fault_of_the_weights(
    vit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out while the weights are read is not taken for wrong weights."""

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(open_clip, "create_model", no_memory)
    with pytest.raises(DeviceError, match="expected memory for a batch"):
        load(vit)


def test_small_batches_stay_small(vit: str, conv: str) -> None:
    """A forward pass is no larger than asked for; on a CPU a power of two that pays."""
    assert [load(vit, batch_size=n).batch_rows for n in (2, 6, 96)] == [2, 4, 16]
    assert load(conv, batch_size=96).batch_rows == 4


def test_loading_says_one_line(
    vit: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device, precision and weights on the log, nothing of open_clip's, no handler left behind."""
    caplog.set_level(logging.INFO, "pipeline")
    handlers = list(logging.getLogger().handlers)
    model = find_model(vit, "")
    load(vit)

    ours = [r.getMessage() for r in caplog.records if r.name == "pipeline"]
    assert ours == [
        f"encoder {model.model_rev} on cpu (2 threads), fp32, weights {model.weights[:48]}"
    ]
    assert logging.getLogger().handlers == handlers


# Weights


def test_weights_of_another_architecture_are_one_line(vit: str) -> None:
    """Weights that do not fit are refused with a hint, not with torch's page of keys."""
    file = Path(vit.removeprefix("local-dir:")) / "open_clip_model.safetensors"

    with pytest.raises(ModelError, match="expected weights that fit the architecture") as error:
        load_encoder(find_model("ViT-S-32-alt", str(file)), "cpu", "fp32", 2)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_wrong_dimension_in_the_configuration_is_refused(vit: str) -> None:
    """The database was checked against embed_dim, so the model must have it."""
    model = find_model(vit, "")
    lying = type(model)(**{**vars(model), "embed_dim": 512})

    with pytest.raises(ModelError, match=f"expected embed_dim 512, found {DIM}"):
        load_encoder(lying, "cpu", "fp32", 2)


def test_missing_weights_are_known_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the weights and with a hub that takes calls but never answers: seconds, one line."""
    model = find_model("ViT-B-32", "laion2b_s34b_b79k")
    monkeypatch.setattr(weights, "_in_cache", lambda *_: None)
    monkeypatch.setattr(weights, "PROBE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(hub_constants, "ENDPOINT", url)
        start = time.monotonic()
        with pytest.raises(ModelError, match=f"no answer from {url}.*local-dir:FOLDER"):
            weights_present(model)
        with pytest.raises(ModelError, match="no answer"):
            load_encoder(model, "cpu", "fp32", 2)

    assert time.monotonic() - start < 4
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        weights_present(model)


def test_cached_weights_need_no_hub(
    vit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in the hub's local cache are loaded without a call, config and all."""
    folder = Path(vit.removeprefix("local-dir:"))
    monkeypatch.setattr(weights, "_in_cache", lambda _, name: _existing(folder / name))
    monkeypatch.setattr(weights, "_answers", lambda _: pytest.fail("asked the hub"))
    model = find_model("hf-hub:someone/tiny", "")
    weights_present(model)
    encoder = load_encoder(model, "cpu", "fp32", 2, 8)
    batch = photos(encoder, 2)

    assert (model.weights, model.embed_dim, encoder.dim) == ("hf-hub:someone/tiny", None, DIM)
    assert encoder.encode(batch).tobytes() == load(vit).encode(batch).tobytes()


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None
