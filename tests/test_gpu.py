"""decode: gpu: which photos go to the GPU, and what becomes of those that it refuses."""

import io
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as vision

from pipeline.encode import GpuDecoder
from pipeline.encoder.model import check_decode, full_preprocess
from pipeline.photos import gpu
from pipeline.photos.files import PhotoError
from pipeline.photos.pixels import Transform, load_pixels, resized_by_weights
from pipeline.stage.errors import SettingsError
from pipeline.stage.settings import Settings

TRANSFORM = Transform(size=(32, 32))
MOST = 10_000_000


def jpeg(
    seed: int = 0, size: tuple[int, int] = (64, 48), orientation: int = 1, **how: Any
) -> bytes:
    """A smooth photo, so that decoders differ by rounding only."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    photo = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    photo.convert(how.pop("mode", "RGB")).save(
        out, **{"format": "JPEG", "quality": 90, "exif": exif, **how}
    )
    return out.getvalue()


def on_the_cores(data: list[torch.Tensor], *_: Any, **__: Any) -> list[torch.Tensor]:
    """A stand-in for nvJPEG: it decodes a list, or fails with what a photo's comment says."""
    photos = [each.numpy().tobytes() for each in data]
    for photo in photos:
        if said := re.search(rb"FAIL (.*?) LIAF", photo, re.DOTALL):
            raise RuntimeError(said[1].decode())
    return [torch.from_numpy(np.array(Image.open(io.BytesIO(p)))).permute(2, 0, 1) for p in photos]


def failing(seed: int, error: str) -> bytes:
    return commented(jpeg(seed), f"FAIL {error} LIAF".encode())


def with_two_frames(photo: bytes) -> bytes:
    """A frame of 65500 x 65500 before the photo's own."""
    frame = photo.index(b"\xff\xc0")
    end = frame + 2 + int.from_bytes(photo[frame + 2 : frame + 4], "big")
    large = photo[frame : frame + 5] + 2 * (65500).to_bytes(2, "big") + photo[frame + 9 : end]
    return photo[:frame] + large + photo[frame:]


def commented(photo: bytes, words: bytes) -> bytes:
    return photo[:2] + b"\xff\xfe" + (len(words) + 2).to_bytes(2, "big") + words + photo[2:]


@pytest.mark.parametrize(
    ("photo", "taken"),
    [
        (jpeg(), True),
        (jpeg(subsampling=0), True),
        (jpeg(subsampling=1), True),
        (jpeg(progressive=True), False),
        (jpeg(mode="L"), False),
        (jpeg(mode="CMYK"), False),
        (jpeg(format="PNG"), False),
        (jpeg()[:-200], False),
        (with_two_frames(jpeg(subsampling=0)), False),
        (jpeg(size=(8200, 16)), False),
    ],
    ids=["420", "444", "422", "progressive", "grey", "cmyk", "png", "cut short", "two", "long"],
)  # fmt: skip
def test_whole_baseline_jpegs_are_for_the_gpu(photo: bytes, taken: bool) -> None:
    """All else is for the cores, which have the last word on what is broken."""
    assert taken == (gpu.jpeg_for_gpu(photo, True, MOST) is not None)


def test_limits_hold_before_the_gpu() -> None:
    """A photo that is too large, or none at all, is refused by its header."""
    with pytest.raises(PhotoError, match="too-large: 3072 pixels"):
        gpu.jpeg_for_gpu(jpeg(), True, 100)
    with pytest.raises(PhotoError, match="broken"):
        gpu.jpeg_for_gpu(b"no photo", True, MOST)


def decoder(monkeypatch: pytest.MonkeyPatch) -> GpuDecoder:
    """The decoder of the line, whose GPU is the stand-in."""
    monkeypatch.setattr(gpu, "decode_jpeg", on_the_cores)
    made = GpuDecoder(full_preprocess({}, 32), Settings(decode="gpu"), "cpu")
    monkeypatch.setattr(made, "_decoded", lambda j: gpu.decode_on_gpu(j, made._transform, "cpu"))
    return made


def test_photos_of_all_kinds_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, orientations, formats and errors mixed: each row is what that photo alone gives."""
    monkeypatch.setattr(gpu, "_PIXELS", 8000)  # so that one call does not do
    files = [
        jpeg(0), jpeg(1, (48, 64)), jpeg(2, orientation=6), b"no photo", jpeg(3, progressive=True),
        jpeg(4, orientation=6), jpeg(5), jpeg(6, format="PNG"), jpeg(7, (300, 40)), jpeg(8)[:-200],
    ]  # fmt: skip
    found = decoder(monkeypatch).many(files)

    for data, pixels in zip(files, found, strict=True):
        try:
            expected = load_pixels(data, TRANSFORM, "full", True, MOST)
        except PhotoError as error:
            assert str(error) == str(pixels)
        else:
            assert isinstance(pixels, torch.Tensor)
            assert torch.equal(expected, pixels)


REFUSED = "Error while decoding JPEG images: Failed to decode batch: "
# What torchvision 0.29 says before, and 0.26 behind each of its messages.
AT = "decode_jpegs_cuda, /a/torchvision/csrc/io/image/cuda/decode_jpegs_cuda.cpp:123, "
BACKTRACE = "\nException raised from prepare_buffers\nframe #2: vision::image::CUDAJpegDecoder::"


@pytest.mark.parametrize("status", ["3", "4", "6", "8", "10", f"2{BACKTRACE}"])
@pytest.mark.parametrize("before", ["", AT])
def test_a_photo_that_the_gpu_refuses_is_the_cores(
    monkeypatch: pytest.MonkeyPatch, before: str, status: str
) -> None:
    """Its mates are still decoded by the GPU: which photos it takes depends on them alone."""
    files = [jpeg(0), failing(1, before + REFUSED + status), jpeg(2)]
    jpegs = [j for data in files if (j := gpu.jpeg_for_gpu(data, True, MOST))]
    monkeypatch.setattr(gpu, "decode_jpeg", on_the_cores)
    decoded = gpu.decode_on_gpu(jpegs, TRANSFORM, "cpu")
    found = decoder(monkeypatch).many(files)

    assert [True, False, True] == [pixels is not None for pixels in decoded]
    assert isinstance(found[1], torch.Tensor)
    assert torch.equal(load_pixels(files[1], TRANSFORM, "full", True, MOST), found[1])


@pytest.mark.parametrize(
    "error",
    [
        "CUDA error: an illegal memory access was encountered",
        "Failed to initialize nvjpeg with hardware backend: 6",
        "decode_jpegs_cuda: torchvision not compiled with nvJPEG support",
        REFUSED + "5",
        f"{AT}{REFUSED}5{BACKTRACE}",
    ],
)
def test_a_gpu_that_fails_is_no_fault_of_the_photo(
    monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    """It comes out: the cores do not go on in silence, slower and with other pixels."""
    monkeypatch.setattr(gpu, "decode_jpeg", on_the_cores)
    lost = gpu.jpeg_for_gpu(failing(0, error), True, MOST)
    assert lost is not None

    with pytest.raises(RuntimeError, match=re.escape(error)):
        gpu.decode_on_gpu([lost], TRANSFORM, "cpu")


def test_a_gpu_that_decodes_nothing_is_no_fault_of_the_photos(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A status that a bad photo has as well is the GPU's where a sound photo gets it, too."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(REFUSED + "6")

    monkeypatch.setattr(gpu, "decode_jpeg", refuse)
    photos = [j for seed in range(2) if (j := gpu.jpeg_for_gpu(jpeg(seed), True, MOST))]

    with pytest.raises(RuntimeError, match="batch: 6"):
        gpu.decode_on_gpu(photos, TRANSFORM, "cpu")


def test_pixels_are_resized_before_their_memory_is_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """nvJPEG does not wait for what is queued on the stream whose memory it is given."""
    events: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            events.append("wait")

    def decode(data: list[torch.Tensor], *_: Any, **__: Any) -> list[torch.Tensor]:
        events.append(f"decode {len(data)}")
        return on_the_cores(data)

    monkeypatch.setattr(gpu, "_PIXELS", 8000)  # two photos
    monkeypatch.setattr(gpu, "decode_jpeg", decode)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    photos = [j for seed in range(5) if (j := gpu.jpeg_for_gpu(jpeg(seed), True, MOST))]
    gpu.decode_on_gpu(photos, TRANSFORM, "cuda")

    assert ["decode 2", "wait", "decode 2", "wait", "decode 1", "wait"] == events


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(48, 64), (63, 301), (32, 32), (7, 5), (33, 1)])
def test_weights_resize_as_torch_does(size: tuple[int, int], interpolation: str) -> None:
    """Within a level, larger and smaller, in one direction or both."""
    noise = np.random.default_rng(0).integers(0, 256, (3, *size), np.uint8)
    how = Transform(interpolation=interpolation).resize_interpolation
    expected = vision.resize(torch.from_numpy(noise), [32, 40], interpolation=how, antialias=True)
    found = resized_by_weights(torch.from_numpy(noise), (32, 40), how)

    assert 1 >= (expected.int() - found.int()).abs().max()


def test_without_a_gpu_it_is_refused() -> None:
    """One line, before anything is read."""
    with pytest.raises(SettingsError, match=r"a CUDA device for decode gpu.*full or scaled"):
        check_decode("gpu", "cpu")
    check_decode("gpu", "cuda")
    check_decode("scaled", "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_pixels_are_those_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a few levels, whatever the size and orientation; the same whatever the mates."""
    monkeypatch.setattr(gpu, "_PIXELS", 400_000)  # five photos: one call does not do
    files = [jpeg(n, (320 + 16 * (n % 3), 240), orientation=1 + n % 8) for n in range(24)]
    made = GpuDecoder(full_preprocess({}, 32), Settings(decode="gpu"), "cuda")
    alone = [made.many([data])[0] for data in files]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(made.many, [files] * 16))

    for row, data in enumerate(files):
        one = alone[row]
        assert isinstance(one, torch.Tensor)
        expected = load_pixels(data, TRANSFORM, "full", True, MOST)
        assert (expected.int() - one.cpu().int()).abs().max() <= 8
        for others in together:
            other = others[row]
            assert isinstance(other, torch.Tensor) and torch.equal(one, other)
