"""The line from select shard to encode shard: order, duplicates, cache hits, failures, memory."""

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from PIL import Image

from pipeline import encode as stage
from pipeline.benchmark import NoCache
from pipeline.encode import EncodeJob, Line, Photo
from pipeline.photos.files import PhotoFolder
from pipeline.stage import parquet
from pipeline.stage.errors import DeviceError
from pipeline.stage.settings import Environment, Settings

T0 = datetime(2026, 1, 1, 12, tzinfo=UTC)
DIM = 512
MISSING = "missing: no such file"


class Shard:
    """A folder of photos, a cache, and the encode stage over literal paths."""

    def __init__(self, folder: Path, encoder: Path) -> None:
        self.folder = folder
        self.encoder = encoder
        self.photos = folder / "photos"
        self.photos.mkdir()
        self.stats: dict[str, Any] = {}

    def photo(self, name: str, seed: int, size: tuple[int, int] = (40, 32)) -> str:
        """Write a photo of noise from `seed`; returns its path."""
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(self.photos / name, "JPEG")
        return name

    def write(self, paths: Sequence[str | None], force: bool = False) -> Path:
        """A select shard with one listing per path."""
        rows = [
            {"generation": 1, "listing_id": i, "edited_date": T0, "image_index": 0,
             "storage_path": path, "score": 0, "rank": 1, "fallback": False}
            for i, path in enumerate(paths)
        ]  # fmt: skip
        made_by = {"export": {"force": force}}
        selected = self.folder / "selected.parquet"
        with parquet.writer(selected, parquet.SELECTED, made_by) as writer:
            writer.write_table(pa.Table.from_pylist(rows, parquet.SELECTED))
        return selected

    def settings(self, **changes: Any) -> Settings:
        values = {"model_name": f"local-dir:{self.encoder}", "device": "cpu", "batch_size": 4}
        return Settings(**{**values, "cache_dir": str(self.folder / "cache"), **changes})

    def job(self, **changes: Any) -> EncodeJob:
        environment = Environment.read({"IMAGE_ROOT_DIR": str(self.photos)})
        return EncodeJob.prepare(self.settings(**changes), environment, threads=2)

    def encode(self, paths: Sequence[str | None], force: bool = False, **changes: Any) -> pa.Table:
        """The encode shard of these paths; its statistics are in `stats`."""
        encoded = self.folder / "encoded.parquet"
        job = self.job(**changes)
        stats = stage.encode(self.write(paths, force), encoded, job.chosen, job)
        self.stats = stats.as_dict()
        return pq.read_table(encoded)

    @property
    def saved(self) -> dict[str, int]:
        """How many encodes were saved, by reason; reasons that saved none are left out."""
        return {reason: n for reason, n in self.stats["saved"].items() if n}


@pytest.fixture
def shard(tmp_path: Path, encoder: Path) -> Shard:
    return Shard(tmp_path, encoder)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the files that were decoded, in any order."""
    lengths: list[int] = []
    original = stage.Decoder.__call__

    def counting(self: stage.Decoder, data: bytes) -> Any:
        lengths.append(len(data))
        return original(self, data)

    monkeypatch.setattr(stage.Decoder, "__call__", counting)
    return lengths


def vectors(table: pa.Table) -> np.ndarray:
    return np.array(table["vec"].to_pylist(), np.float32)


def test_rows_come_out_as_they_went_in(shard: Shard) -> None:
    """One row per selected image, in its order and with its columns: a unit vector or an error."""
    (shard.photos / "broken.jpg").write_bytes(b"no photo")
    names = [shard.photo(f"{i}.jpg", i) for i in range(9)]
    paths = [names[0], None, *names[1:5], "broken.jpg", "gone.jpg", *names[5:], "../x.jpg"]
    table = shard.encode(paths)
    errors = table["error"].to_pylist()
    lengths = np.linalg.norm(vectors(table.filter(pa.compute.is_null(table["error"]))), axis=1)

    assert parquet.encoded(DIM).names == table.schema.names
    assert paths == table["storage_path"].to_pylist()
    assert list(range(13)) == table["listing_id"].to_pylist()
    assert "missing: the row has no storage_path" == errors[1]
    assert "broken: not an image of a known format" == errors[6]
    assert MISSING == errors[7]
    assert "outside: the storage_path holds '..'" == errors[12]
    assert [None] * 9 == [e for i, e in enumerate(errors) if i not in (1, 6, 7, 12)]
    assert [e is not None for e in errors] == [v is None for v in table["vec"].to_pylist()]
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
    assert {"broken": 1, "missing": 2, "outside": 1} == shard.stats["failed"]
    assert (13, 9) == (shard.stats["images"], shard.stats["encoded"])


def test_an_empty_shard_is_an_empty_file(shard: Shard) -> None:
    """No rows in, no rows out, and the schema is there."""
    table = shard.encode([])

    assert (0, parquet.encoded(DIM).names) == (table.num_rows, table.schema.names)


def test_the_same_bytes_are_encoded_once(shard: Shard, decoded: list[int]) -> None:
    """A photo under many names, near and far apart, is decoded and encoded once."""
    other = [shard.photo(f"other{i}.jpg", 100 + i) for i in range(30)]
    twins = [shard.photo(f"twin{i}.jpg", 1) for i in range(4)]
    paths = [twins[0], twins[1], *other, twins[2], twins[0], twins[3]]
    table = shard.encode(paths)
    found = vectors(table)

    assert 31 == len(decoded) == shard.stats["encoded"]
    assert 4 == sum(shard.saved.values())
    assert 1 == len({found[i].tobytes() for i in (0, 1, 32, 33, 34)})
    assert 31 == len({row.tobytes() for row in found})


def test_a_broken_file_breaks_its_twins_too(shard: Shard, decoded: list[int]) -> None:
    """The same broken bytes under two names are tried once and are both errors."""
    for name in ("a.jpg", "b.jpg"):
        (shard.photos / name).write_bytes(b"no photo")
    table = shard.encode(["a.jpg", "b.jpg", shard.photo("c.jpg", 1)])

    assert ["broken: not an image of a known format"] * 2 == table["error"].to_pylist()[:2]
    assert 2 == len(decoded)
    assert {"broken": 2} == shard.stats["failed"]


def test_twins_wait_for_the_photo_that_is_under_way(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes met while they are decoded have the same vector, or the same error."""
    met = threading.Event()
    claim, decode = Line._claim, stage.Decoder.__call__

    def claiming(line: Line, photo: Photo) -> bool:
        mine = claim(line, photo)
        if not mine:
            met.set()
        return mine

    def decoding(decoder: stage.Decoder, data: bytes) -> Any:
        assert met.wait(20)
        return decode(decoder, data)

    monkeypatch.setattr(Line, "_claim", claiming)
    monkeypatch.setattr(stage.Decoder, "__call__", decoding)
    for name in ("a.jpg", "b.jpg"):
        (shard.photos / name).write_bytes(b"no photo")
    broken = shard.encode(["a.jpg", "b.jpg"])
    failed = shard.stats["failed"]
    met.clear()
    whole = shard.encode([shard.photo("c.jpg", 1), shard.photo("d.jpg", 1)])

    assert ["broken: not an image of a known format"] * 2 == broken["error"].to_pylist()
    assert {"broken": 2} == failed
    assert {"same bytes in this run": 1} == shard.saved
    assert 1 == len({row.tobytes() for row in vectors(whole)})


def test_what_is_cached_is_not_read(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known files are neither opened for reading nor decoded, and have the same vectors."""
    paths: list[str | None] = [shard.photo(f"{i}.jpg", i) for i in range(6)]
    first = shard.encode(paths)
    monkeypatch.setattr(PhotoFolder, "read", lambda *args: pytest.fail("a file was read"))
    second = shard.encode(paths[::-1])

    assert {"same file": 6} == shard.saved
    assert 0 == shard.stats["encoded"]
    assert vectors(first).tobytes() == vectors(second)[::-1].tobytes()


def test_a_renamed_file_is_known_by_its_bytes(shard: Shard, decoded: list[int]) -> None:
    """A new name or a new mtime costs a read, no decode; a second time not even that."""
    first = shard.encode([shard.photo("old.jpg", 1), shard.photo("touched.jpg", 2)])
    (shard.photos / "old.jpg").rename(shard.photos / "new.jpg")
    os.utime(shard.photos / "touched.jpg", ns=(1, 1))
    decoded.clear()
    second = shard.encode(["new.jpg", "touched.jpg"])
    saved = shard.saved
    shard.encode(["new.jpg", "touched.jpg"])

    assert {"same bytes": 2} == saved
    assert {"same file": 2} == shard.saved
    assert [] == decoded
    assert vectors(first).tobytes() == vectors(second).tobytes()


def test_a_failure_is_remembered_until_the_file_changes(shard: Shard, decoded: list[int]) -> None:
    """A broken file is not tried twice; a whole photo in its place is encoded."""
    (shard.photos / "a.jpg").write_bytes(b"no photo")
    errors = [shard.encode(["a.jpg"])["error"].to_pylist() for _ in range(2)]
    tried = len(decoded)
    shard.photo("a.jpg", 1)
    mended = shard.encode(["a.jpg"])

    assert [["broken: not an image of a known format"]] * 2 == errors
    assert (1, 2) == (tried, len(decoded))
    assert [None] == mended["error"].to_pylist()


def test_a_missing_file_is_not_remembered(shard: Shard) -> None:
    """A file that appears is encoded the next time."""
    missing = shard.encode(["a.jpg"])
    shard.photo("a.jpg", 1)
    found = shard.encode(["a.jpg"])

    assert [MISSING] == missing["error"].to_pylist()
    assert [None] == found["error"].to_pylist()


def test_a_limit_is_no_property_of_the_file(shard: Shard) -> None:
    """A photo refused for its size is not remembered: the limit may be another next time."""
    path = shard.photo("a.jpg", 1)
    refused = shard.encode([path], max_image_pixels=100)
    allowed = shard.encode([path])

    assert ["too-large: 1280 pixels, more than the 100 allowed"] == refused["error"].to_pylist()
    assert [None] == allowed["error"].to_pylist()


def test_force_reads_nothing_and_refreshes(shard: Shard, decoded: list[int]) -> None:
    """A forced shard decodes all again, and the next run finds what it wrote."""
    paths: list[str | None] = [shard.photo(f"{i}.jpg", i) for i in range(3)]
    first = shard.encode(paths)
    forced = shard.encode(paths, force=True)
    tried = (len(decoded), shard.stats["encoded"], shard.saved)
    shard.encode(paths)

    assert (6, 3, {}) == tried
    assert {"same file": 3} == shard.saved
    assert vectors(first).tobytes() == vectors(forced).tobytes()


def test_another_decode_mode_is_another_vector(shard: Shard) -> None:
    """What one setting has encoded is no hit for another."""
    path = shard.photo("a.jpg", 1, (800, 600))
    full = shard.encode([path])
    scaled = shard.encode([path], decode="scaled")

    assert 1 == shard.stats["encoded"]
    assert vectors(full).tobytes() != vectors(scaled).tobytes()


def test_a_vector_does_not_depend_on_its_mates(shard: Shard) -> None:
    """Alone, in another order, in another batch, on one thread: the same bits."""
    names: list[str | None] = [shard.photo(f"{i}.jpg", i, (40 + i, 32)) for i in range(11)]
    together = vectors(shard.encode(names))
    reverse = vectors(shard.encode(names[::-1], force=True))[::-1]
    alone = np.concatenate([vectors(shard.encode([n], force=True)) for n in names[:3]])

    assert together.tobytes() == reverse.tobytes()
    assert together[:3].tobytes() == alone.tobytes()


def test_the_last_row_of_a_full_chunk(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk and batch borders lose and double no row, whatever is cached between them."""
    monkeypatch.setattr(stage, "CHUNK_ROWS", 4)
    monkeypatch.setattr(stage, "LONGEST_WAIT", 8)
    names = [shard.photo(f"{i}.jpg", i) for i in range(8)]
    shard.encode([names[0]])
    for rows in (1, 4, 5, 8, 9, 40):
        paths = [names[1 + i // 12 if i % 12 == 5 else 0] for i in range(rows)]
        assert paths == shard.encode(paths)["storage_path"].to_pylist()


def test_batches_are_full(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the last, every batch has batch_size photos, broken and known ones between them."""
    monkeypatch.setattr(stage, "LONGEST_WAIT", 8)
    lengths: list[int] = []
    original = Line.encode_pixels

    def counting(self: Line, pixels: Sequence[Any]) -> np.ndarray:
        lengths.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(Line, "encode_pixels", counting)
    (shard.photos / "broken.jpg").write_bytes(b"no photo")
    names = [shard.photo(f"{i}.jpg", i) for i in range(50)]
    shard.encode(names[::10])  # five are in the cache now
    lengths.clear()
    shard.encode([name for photo in names for name in (photo, "broken.jpg")], batch_size=16)
    assert [13, 16, 16] == sorted(lengths)


def test_cached_means_no_torch(shard: Shard) -> None:
    """A shard of hits, remembered failures and missing files loads neither torch nor weights."""
    (shard.photos / "broken.jpg").write_bytes(b"no photo")
    paths = [shard.photo("a.jpg", 1), "broken.jpg", "gone.jpg"]
    shard.encode(paths)
    selected = shard.write(paths)
    command = [
        "pipeline.encode", "--selected", str(selected),
        "--encoded", str(shard.folder / "e.parquet"), "--device", "cpu",
        "--stats", str(shard.folder / "stats.json"),
        "--model-name", f"local-dir:{shard.encoder}", "--cache-dir", str(shard.folder / "cache"),
    ]  # fmt: skip
    program = (
        f"import sys; sys.argv = {command!r}; from pipeline import encode; encode.main();"
        " print([name for name in ('torch', 'open_clip', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "IMAGE_ROOT_DIR": str(shard.photos), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert "[]\n" == done.stdout
    assert 1 == json.loads((shard.folder / "stats.json").read_text())["saved"]["same file"]


class Counted:
    """How many decoded photos are alive at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = 0
        original = stage.Decoder.__call__

        def counting(decoder: stage.Decoder, data: bytes) -> Any:
            pixels = original(decoder, data)
            self.alive.add(pixels)
            self.most = max(self.most, len(self.alive))
            return pixels

        monkeypatch.setattr(stage.Decoder, "__call__", counting)


def test_few_photos_are_in_memory(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the shard, pixels of a window and of the batches under way are held."""
    counted = Counted(monkeypatch)
    names = [shard.photo(f"{i}.jpg", i, (8, 8)) for i in range(300)]
    line = Line(shard.job(), NoCache(DIM))
    most = line.window + 1 + (line.batches_under_way + 1) * 4
    sent = 0

    def photos() -> Iterator[Photo]:
        nonlocal sent
        for name in names:
            sent += 1
            yield Photo(name)

    with line:
        for done, _ in enumerate(line.done(photos()), 1):
            assert sent - done <= most
    gc.collect()

    assert 300 == done
    assert counted.most <= most < 60
    assert 0 == len(counted.alive)


def test_a_gpu_is_set_up_before_it_decodes(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cache may have all photos: passes are recorded while nothing else goes on."""
    monkeypatch.setattr("pipeline.encoder.model._cuda_devices", lambda: 1)
    names = [shard.photo(f"{i}.jpg", i) for i in range(40)]
    encoder, events = shard.job().encoder, []

    class OnGpu(stage.Decoder):
        def __init__(self, preprocess: dict[str, Any], chosen: Settings, device: str) -> None:
            super().__init__(preprocess, chosen)
            events.append(f"decode on {device}")

    def loaded(job: EncodeJob) -> Any:
        events.append("load")
        return encoder

    monkeypatch.setattr(stage, "GpuDecoder", OnGpu)
    monkeypatch.setattr(EncodeJob, "encoder", property(loaded))
    for some in (names[:4], names):
        events.clear()
        shard.encode(some, device="cuda", precision="fp32", decode="gpu")

    assert {"same file": 4} == shard.saved
    assert ["load", "decode on cuda"] == list(dict.fromkeys(events))
    assert 1 == events.count("decode on cuda")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("CUDA out of memory. Tried"), DeviceError, r"\(batch_size 4\); hint: lower"),
        (RuntimeError("CUDA error: unspecified launch failure"), DeviceError, "run it again"),
        (MemoryError(), DeviceError, "expected memory for a batch"),
        (ZeroDivisionError("a fault"), ZeroDivisionError, "a fault"),
    ],
    ids=str,
)
def test_a_failing_gpu_ends_the_shard_at_once(
    shard: Shard,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    message: str,
) -> None:
    """The first failure is the shard's, though photos are still read; what was encoded is kept."""
    monkeypatch.setattr("pipeline.encoder.model._cuda_devices", lambda: 1)
    reading, batches = threading.Event(), 0
    names = [shard.photo(f"{i}.jpg", i) for i in range(40)]
    decode = stage.Decoder.__call__

    def stuck(decoder: stage.Decoder, data: bytes) -> Any:
        if data == (shard.photos / names[-1]).read_bytes():
            reading.wait()
        return decode(decoder, data)

    monkeypatch.setattr(stage.Decoder, "__call__", stuck)
    job = shard.job(device="cuda", precision="fp32", batch_size=4)
    encoder = shard.job().encoder
    original: Callable[..., np.ndarray] = encoder.encode

    def fail_later(batch: Any) -> np.ndarray:
        nonlocal batches
        batches += 1
        if batches > 2:
            raise error
        return original(batch)

    monkeypatch.setattr(encoder, "encode", fail_later)
    vars(job)["encoder"] = encoder
    try:
        with pytest.raises(kind, match=message):
            stage.encode(shard.write(names), shard.folder / "e.parquet", job.chosen, job)
    finally:
        reading.set()
    monkeypatch.undo()
    left = sorted(path.name for path in shard.folder.glob("*.parquet"))
    shard.encode(names)

    assert ["selected.parquet"] == left
    assert {"same file": 8} == shard.saved


def test_a_stage_leaves_a_thread_that_waits_for_ever(shard: Shard) -> None:
    """A stage whose disk does not answer ends all the same when its GPU has failed."""
    selected = shard.write([shard.photo(f"{i}.jpg", i) for i in range(40)])
    command = [
        "pipeline.encode", "--selected", str(selected),
        "--encoded", str(shard.folder / "e.parquet"), "--stats", str(shard.folder / "stats.json"),
        "--model-name", f"local-dir:{shard.encoder}", "--cache-dir", str(shard.folder / "cache"),
        "--threads", "4",
    ]  # fmt: skip
    program = f"""
import sys, threading; sys.argv = {command!r}
from pipeline import encode
from pipeline.encoder.tower import Encoder
from pipeline.photos.files import PhotoFolder
read, calls = PhotoFolder.read, []
def stuck(folder, path):
    if path == "39.jpg":
        threading.Event().wait()
    return read(folder, path)
def fail(*_):
    calls.append(1)
    if len(calls) > 1:  # the first makes sure of the dimension
        raise RuntimeError("CUDA error: device-side assert triggered")
    return forward(*_)
forward = Encoder._forward
PhotoFolder.read, Encoder._forward = stuck, fail
encode.command.run(encode.main, "encode")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "IMAGE_ROOT_DIR": str(shard.photos), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert 1 == done.returncode, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error in encode: expected a GPU that computes, found CUDA error: device-side assert"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_without_direction_is_an_error(
    shard: Shard, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value that is no number is that photo's error, and is not remembered as the file's."""
    names = [shard.photo(f"{i}.jpg", i) for i in range(2)]
    job = shard.job()
    original: Callable[..., np.ndarray] = job.encoder.encode

    def first_is_bad(batch: Any) -> np.ndarray:
        found = original(batch)
        found[0, 1] = bad
        return found

    monkeypatch.setattr(job.encoder, "encode", first_is_bad)
    encoded = shard.folder / "e.parquet"
    stats = stage.encode(shard.write(names), encoded, job.chosen, job)
    errors = pq.read_table(encoded)["error"].to_pylist()
    again = shard.encode(names)

    assert {None, stage.NO_VECTOR} == set(errors)
    assert {"vector": 1} == stats.as_dict()["failed"]
    assert [None, None] == again["error"].to_pylist()
    assert {"same file": 1} == shard.saved
