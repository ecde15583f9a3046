"""Encode the selected images of one shard into unit vectors.

Reads: a select shard, the image files under IMAGE_ROOT_DIR, the vector cache. Writes: the encode
shard (one row per selected image, in its order: a unit vector, or null and the error) and its
statistics. Guarantees: rows in = rows out; an image's vector does not depend on the others; what
is in the cache is neither decoded nor encoded; memory does not grow with the shard.

Threads read, hash, decode and, on a CPU, encode: each has a core of its own, and work is theirs
by the handful of photos or by the batch. One looks the next rows up in the cache meanwhile. The
main thread makes full batches and writes rows in order.
"""

import argparse
import functools
import gc
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.cache.parts import Entry, Outcome
from pipeline.cache.vectors import VectorCache
from pipeline.encoder.claim import claim
from pipeline.encoder.model import (
    Fingerprint,
    Model,
    check_decode,
    fingerprint,
    model_of,
    resolve_device,
    resolve_precision,
)
from pipeline.photos.ahead import Ahead, limit
from pipeline.photos.files import NOT_THERE, FileStat, PhotoError, Photos
from pipeline.photos.root import photos_at
from pipeline.stage import command, parquet, settings
from pipeline.stage.command import log
from pipeline.stage.errors import DataError, ModelError, WrongImageRoot
from pipeline.stage.settings import Environment, Settings

if TYPE_CHECKING:  # a shard with nothing to encode loads no torch
    import torch

    from pipeline.encoder.tower import Encoder

CHUNK_ROWS = 1024  # looked up in the cache together, and written together
LONGEST_WAIT = 8192  # at least so many rows wait behind one that is not done, before it is hurried
REFRESH_S = 5.0  # how often vectors of other running shards are picked up
GPU_BATCHES = 2  # one computes while the next is copied
GPU_HANDFUL = 8  # photos that a thread beside a GPU takes at a time: fewer waits for Python's lock
GPU_DECODED = 64  # in one call of a GPU's decoder: an H100 does 16 at 80 % of its rate
GPU_DECODERS = 4  # calls at a time: one decodes, others resize; each takes half a gigabyte and more
LEAVE_S = 2.0  # for batches under way when the line ends with an error
WITNESS_THREADS = 8  # on network filesystems a stat is a round trip
FIRST_ASKED = 32  # photos of a chunk in a store: where none is in the cache, few of the others are
NO_VECTOR = "vector: the encoder gave a zero or non-finite vector"

SETTINGS = (
    "model_name", "pretrained", "precision", "decode", "apply_exif_orientation",
    *settings.PHOTO_LIMITS, "batch_size", "num_workers", "device",
)  # fmt: skip


def main() -> None:
    args = parse_args()
    chosen = settings.from_flags(args)
    job = EncodeJob.prepare(chosen, Environment.read(), args.threads, args.weights)
    stats = encode(args.selected, args.encoded, chosen, job)
    parquet.write_json(args.stats, stats.as_dict())
    log.info("%s -> %s", stats, args.encoded)
    gc.freeze()  # it all goes with the process: to look through torch takes most of a second


def parse_args() -> argparse.Namespace:
    parser = command.stage_parser(__doc__)
    parser.add_argument("--selected", type=Path, required=True, help="select shard to read")
    parser.add_argument("--encoded", type=Path, required=True, help="encode shard to write")
    parser.add_argument("--stats", type=Path, required=True, help="statistics to write (JSON)")
    add_encoder_flags(parser)
    settings.add_flags(parser, "cache_dir", "max_failed_fraction")
    return parser.parse_args()


def add_encoder_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that encode and benchmark share."""
    settings.add_flags(parser, *SETTINGS)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU cores to use")
    parser.add_argument("--weights", default="", help="refuse other weights than these")


@dataclass(frozen=True)
class EncodeJob:
    """Everything that is known before the first image is read."""

    model: Model
    fingerprint: Fingerprint
    photos: Photos
    device: str
    precision: str
    threads: int
    chosen: Settings
    root: tuple[int, int]  # which the image root was

    @classmethod
    def prepare(
        cls, chosen: Settings, environment: Environment, threads: int, weights: str = ""
    ) -> "EncodeJob":
        """Check the image root, the model and the device; loads neither torch nor weights."""
        photos = photos_at(environment.image_root, chosen)
        root = photos.check()
        model = model_of(chosen)
        if weights and model.weights != weights:
            raise ModelError(
                f"weights {weights[:12]}", model.weights[:12], chosen.model_name,
                "they changed since the workflow was planned; run it again",
            )  # fmt: skip
        device = claim(resolve_device(chosen.device))
        precision = resolve_precision(chosen.precision, device)
        check_decode(chosen.decode, device)
        return cls(
            model=model,
            fingerprint=fingerprint(
                model,
                precision=precision,
                decode=chosen.decode,
                apply_exif_orientation=chosen.apply_exif_orientation,
            ),
            photos=photos,
            device=device,
            precision=precision,
            threads=threads,
            chosen=chosen,
            root=root,
        )

    def check_root(self) -> None:
        """The image root still is the folder that it was; else DataError.

        Without it every photo would count as missing, and listings would go in with the few
        images that were read before.
        """
        if self.photos.check() != self.root:
            raise DataError(
                "the folder of images that was there at the start", "another",
                str(self.photos.root), "run it again; nothing that was encoded is lost",
            )  # fmt: skip

    def check_witnesses(self, witnesses: list[list[str]]) -> int:
        """How many of these listings still have a photo; WrongImageRoot if most have lost theirs.

        Each names photos of a listing that has a vector. One alone is no evidence.
        """
        with ThreadPoolExecutor(self.photos.readers or WITNESS_THREADS) as pool:
            there = sum(pool.map(self.photos.has_any, witnesses))
        gone = len(witnesses) - there
        if gone > max(1, self.chosen.max_failed_fraction * len(witnesses)):
            raise WrongImageRoot(
                f"at most {self.chosen.max_failed_fraction:.0%} of the listings that have a vector"
                " to have lost their photos (max_failed_fraction)",
                f"{gone} of the {len(witnesses)} newest",
                str(self.photos.root),
                "check IMAGE_ROOT_DIR; if the photos were removed on purpose:"
                " --config max_failed_fraction=1",
            )
        return there

    @functools.cached_property
    def encoder(self) -> "Encoder":
        """The encoder with its weights in memory, loaded once; imports torch."""
        from pipeline.encoder.tower import load_encoder

        return load_encoder(
            self.model, self.device, self.precision, self.threads, self.chosen.batch_size
        )

    @property
    def dim(self) -> int:
        """The length of the vectors; only of a model that lives on a hub is it in the weights."""
        return self.model.embed_dim or self.encoder.dim

    @property
    def workers(self) -> int:
        """Threads that decode, at most one a core; on a CPU they encode too, so all cores."""
        if self.device == "cpu" or self.chosen.num_workers == "auto":
            return self.threads
        return max(1, min(self.chosen.num_workers, self.threads))


class Decoder:
    """The bytes of photos to uint8 pixels of shape (3, height, width), on any thread."""

    def __init__(self, preprocess: dict[str, Any], chosen: Settings) -> None:
        import torch

        from pipeline.photos.pixels import Transform, load_pixels

        torch.set_num_threads(1)  # photos are decoded side by side, not each by many
        self._load = load_pixels
        self._transform = Transform.from_preprocess_cfg(preprocess)
        self._chosen = chosen

    def __call__(self, data: bytes) -> "torch.Tensor":
        """Raises PhotoError."""
        chosen = self._chosen
        return self._load(
            data,
            self._transform,
            chosen.decode,
            chosen.apply_exif_orientation,
            chosen.max_image_pixels,
        )

    def many(self, files: "Sequence[bytes]") -> "list[torch.Tensor | PhotoError]":
        """The pixels of each file, or why there are none."""
        return [self._or_error(data) for data in files]

    def _or_error(self, data: bytes) -> "torch.Tensor | PhotoError":
        try:
            return self(data)
        except PhotoError as error:
            return error


class GpuDecoder(Decoder):
    """`decode: gpu`: baseline JPEGs on the GPU, where their pixels stay, the others by the cores.

    GPU_DECODERS threads of its own ask the GPU, each with a stream of its own, for any number of
    callers. Raises DeviceError where the GPU fails.
    """

    def __init__(self, preprocess: dict[str, Any], chosen: Settings, device: str) -> None:
        super().__init__(preprocess, chosen)
        from pipeline.photos import gpu

        self._gpu = gpu
        self._device = device
        self._threads = ThreadPoolExecutor(GPU_DECODERS, "decode-gpu")
        self._streams = threading.local()

    def many(self, files: "Sequence[bytes]") -> "list[torch.Tensor | PhotoError]":
        """The pixels of each file, or why there are none."""
        outcomes = dict(enumerate(self._header(data) for data in files))
        jpegs = {row: each for row, each in outcomes.items() if isinstance(each, self._gpu.Jpeg)}
        if jpegs:
            decoded = self._threads.submit(self._decoded, list(jpegs.values())).result()
            outcomes |= zip(jpegs, decoded, strict=True)
        return [
            self._or_error(data) if outcomes[row] is None else outcomes[row]
            for row, data in enumerate(files)
        ]

    def _header(self, data: bytes) -> Any:
        chosen = self._chosen
        try:
            return self._gpu.jpeg_for_gpu(
                data, chosen.apply_exif_orientation, chosen.max_image_pixels
            )
        except PhotoError as error:
            return error

    def _decoded(self, jpegs: list[Any]) -> "list[torch.Tensor | None]":
        import torch

        from pipeline.encoder.tower import device_errors

        with device_errors(f"decode {self._chosen.decode}"), torch.cuda.device(self._device):
            if not hasattr(self._streams, "mine"):
                self._streams.mine = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._streams.mine):
                return self._gpu.decode_on_gpu(jpegs, self._transform, self._device)


@dataclass(eq=False)
class Photo:
    """One row of the shard on its way through; done when it has a vector or an error."""

    path: str | None
    stat: FileStat | None = None
    digest: bytes = b""
    pixels: "torch.Tensor | None" = None
    outcome: Outcome | None = None  # a vector, or why there is none
    how: str = ""  # encoded, or which lookup saved the encode
    twins: "list[Photo]" = field(
        default_factory=list
    )  # same bytes, met while this one is under way

    @property
    def done(self) -> bool:
        return self.outcome is not None

    @property
    def error(self) -> str | None:
        return self.outcome if isinstance(self.outcome, str) else None


@dataclass
class Stats:
    """What a shard took, and which encodes it was spared."""

    images: int = 0
    how: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    rate: float | None = None  # images encoded a second, once the encoder was at work
    waited: float | None = None  # share of the time that went into waiting for an object store

    def add(self, photo: Photo) -> None:
        self.images += 1
        if photo.error is None:
            self.how[photo.how] += 1
        else:
            self.failed[photo.error.split(":")[0]] += 1

    def as_dict(self) -> dict[str, Any]:
        """As it is kept beside the shard."""
        return {
            "images": self.images,
            "encoded": self.how["encoded"],
            "saved": {
                k: self.how[k] for k in ("same file", "same bytes", "same bytes in this run")
            },
            "failed": dict(sorted(self.failed.items())),
            "seconds": round(self.seconds, 3),
            "images_per_second": self.rate and round(self.rate, 3),
            "waited_for_store": self.waited and round(self.waited, 3),
        }

    def __str__(self) -> str:
        parts = [f"{self.images} images: {self.how['encoded']} encoded"]
        parts += [f"{n} {how}" for how, n in sorted(self.how.items()) if how != "encoded"]
        parts += [f"{n} {reason}" for reason, n in sorted(self.failed.items())]
        return f"{', '.join(parts)}; {self.seconds:.1f} s{limit(self.waited)}"


def encode(selected: Path, encoded: Path, chosen: Settings, job: EncodeJob) -> Stats:
    """Write the encode shard; returns its statistics."""
    made_by = parquet.metadata(selected)
    made_by["encoder"] = encoder = job.fingerprint.as_dict()
    expected = parquet.rows([selected])
    witnesses = made_by.pop("witnesses", [])
    made_by["witnesses_there"] = job.check_witnesses(witnesses) if expected else 0
    force = made_by.get("export", {}).get("force", False)
    cache = VectorCache.of(Path(chosen.cache_dir), encoder, job.dim, read=not force)
    start = time.monotonic()
    with cache, Line(job, cache) as line:
        stats = _write(selected, encoded, made_by, line)
        stats.waited = line.waited_s / (time.monotonic() - start) if job.photos.readers else None
    stats.seconds = time.monotonic() - start
    if stats.images != expected:
        raise DataError(f"{expected} images", f"{stats.images} encoded", str(encoded))
    return stats


def _write(selected: Path, encoded: Path, made_by: dict[str, Any], line: "Line") -> Stats:
    """Send the shard's rows down the line and write what comes out, chunk by chunk."""
    stats, progress = Stats(), command.Progress(parquet.rows([selected]), "images")
    sent: deque[pa.Table] = deque()

    def chunks() -> Iterator[list[str | None]]:
        for batch in parquet.batches(selected, CHUNK_ROWS):
            sent.append(pa.Table.from_batches([batch]))
            yield batch.column("storage_path").to_pylist()

    dim = line.job.dim
    with parquet.writer(encoded, parquet.encoded(dim), made_by) as writer:
        done = line.done(line.looked_up_ahead(chunks()))
        while chunk := list(_counted(islice(done, CHUNK_ROWS), stats, progress)):
            table = _with_outcomes(sent.popleft(), chunk, dim)
            writer.write_table(table, row_group_size=CHUNK_ROWS)
    stats.rate = progress.rate
    return stats


def _counted(photos: Iterable[Photo], stats: Stats, progress: command.Progress) -> Iterator[Photo]:
    for photo in photos:
        stats.add(photo)
        progress.update(stats.images, stats.how["encoded"])
        yield photo


def _with_outcomes(selected: pa.Table, photos: list[Photo], dim: int) -> pa.Table:
    """The selected rows with size, mtime_ns, vec and error of their photos."""
    values = np.zeros((len(photos), dim), np.float32)
    for row, photo in enumerate(photos):
        if photo.error is None:
            values[row] = photo.outcome
    null = pa.array([photo.error is not None for photo in photos], pa.bool_())
    outcomes = {
        "size": [photo.stat.size if photo.stat else None for photo in photos],
        "mtime_ns": [photo.stat.mtime_ns if photo.stat else None for photo in photos],
        "vec": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim, mask=null),
        "error": [photo.error for photo in photos],
    }
    schema = parquet.encoded(dim)
    columns = [outcomes.get(name, selected[name] if name in selected.schema.names else None)
               for name in schema.names]  # fmt: skip
    return pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema)


class Line(AbstractContextManager["Line"]):
    """Reader, decoder and encoder of one shard, joined by bounded queues."""

    def __init__(self, job: EncodeJob, cache: VectorCache) -> None:
        self.job = job
        self.cache = cache
        self.lock = threading.Lock()  # over under_way, and what a photo has become
        self.under_way: dict[bytes, Photo] = {}
        self.together = 1
        if job.device != "cpu":
            self.together = GPU_DECODED if job.chosen.decode == "gpu" else GPU_HANDFUL
        self.handful: list[Photo] = []
        self.working: deque[tuple[list[Photo], Future[None]]] = deque()
        self.batch: list[Photo] = []
        self.encoding: deque[Future[None]] = deque()
        self.refreshed = time.monotonic()
        self.ahead = Ahead(job.photos)
        self.cache_helps = bool(cache.entries)
        self.lookups_s = 0.0  # waited for the store's answers, with nothing else to do
        self.asker = ThreadPoolExecutor(1, "ask")
        self.decoders = self.encoders = ThreadPoolExecutor(job.workers, "decode")
        if job.device != "cpu":
            self.encoders = ThreadPoolExecutor(GPU_BATCHES, "encode")
        self.over = False

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """After an error, batches under way are kept if they are done in a moment.

        No thread is waited for then: one may read from a disk that does not answer.
        """
        for pool in (self.asker, self.decoders, self.encoders):
            pool.shutdown(wait=kind is None, cancel_futures=True)
        self.ahead.close(wait=kind is None)
        wait([batch for batch in self.encoding if not batch.cancelled()], LEAVE_S)
        with self.lock:
            self.over = True  # the cache closes now

    @functools.cached_property
    def decoder(self) -> Decoder:
        if self.job.chosen.decode == "gpu":  # its encoder sets a GPU up, and records passes, first
            return GpuDecoder(self.job.encoder.preprocess, self.job.chosen, self.job.device)
        # Only of a model that lives on a hub are the pixels not known before it is loaded.
        return Decoder(self.job.model.preprocess or self.job.encoder.preprocess, self.job.chosen)

    def looked_up_ahead(self, chunks: Iterable[list[str | None]]) -> Iterator[Photo]:
        """The photos of all chunks; the next chunk is looked up while one is worked on."""
        before: Future[list[Photo]] | None = None
        for chunk in chunks:
            after = self.asker.submit(self.looked_up, chunk)
            if before is not None:
                yield from self._found(before)
            before = after
        if before is not None:
            yield from self._found(before)

    def _found(self, asked: Future[list[Photo]]) -> list[Photo]:
        """Wait for a chunk's look-up."""
        idle, start = not self.working, time.monotonic()
        photos = asked.result()
        self.lookups_s += (time.monotonic() - start) * idle
        return photos

    def looked_up(self, paths: list[str | None]) -> list[Photo]:
        """The photos of a chunk; done are those whose file is missing or in the cache.

        In a store, whose answers take long and cost money, that is asked of a few first.
        """
        photos = [Photo(path) for path in paths]
        if not self.job.photos.readers:
            self._look_up(photos)
        elif self.cache_helps:
            every = max(1, len(photos) // FIRST_ASKED)
            if self._look_up(photos[::every]):
                self._look_up([p for p in photos if p.stat is None and not p.done])
        return photos

    def _look_up(self, photos: list[Photo]) -> bool:
        """Whether one of them at least is in the cache."""
        stats = self.job.photos.stats([photo.path for photo in photos])
        for photo, found in zip(photos, stats, strict=True):
            if isinstance(found, FileStat):
                photo.stat = found
            else:
                photo.outcome = str(found)
        self._check_missing(*(photo.error for photo in photos if photo.error))
        self._refresh()
        return self._settle_same([photo for photo in photos if photo.stat is not None])

    def _settle_same(self, photos: list[Photo]) -> bool:
        """Give those that the cache knows in this state their outcome; whether there is one."""
        hits = self.cache.lookup_files(
            [photo.path or "" for photo in photos],
            np.array([photo.stat.size for photo in photos if photo.stat], np.int64),
            np.array([photo.stat.mtime_ns for photo in photos if photo.stat], np.int64),
        )
        for row, photo in enumerate(photos):
            photo.outcome, photo.how = hits.get(row), "same file"
        return len(hits) > 0

    def _check_missing(self, *errors: str) -> None:
        if any(error.startswith(NOT_THERE) for error in errors):
            self.job.check_root()

    def _refresh(self) -> None:
        """Pick up what other shards have encoded meanwhile."""
        if time.monotonic() - self.refreshed > REFRESH_S:
            self.cache.refresh()
            self.refreshed = time.monotonic()

    def done(self, photos: Iterable[Photo]) -> Iterator[Photo]:
        """The photos with their outcome, in the order they came in."""
        waiting: deque[Photo] = deque()
        for photo in photos:
            waiting.append(photo)
            if not photo.done and (stat := self.ahead.fetched.get(photo.path)):
                photo.stat = stat
                self._settle_same([photo])
            if not photo.done:
                if not self.cache.entries:
                    self.job.encoder  # noqa: B018  bad weights show before the first image is read
                if self.job.chosen.decode == "gpu":
                    self.decoder  # noqa: B018  one for all threads
                self.ahead.expect(photo.path)
                self.handful.append(photo)
                if len(self.handful) >= self.together:
                    self._send_handful()
            while len(self.working) * self.together > self.window:
                self._collect()
            if len(waiting) > self.longest_wait:
                self._finish_all()
            while waiting and waiting[0].done:
                yield waiting.popleft()
        self._finish_all()
        yield from waiting

    def _finish_all(self) -> None:
        """Decode and encode what is here, be it less than a handful or a batch, to its end."""
        if self.handful:
            self._send_handful()
        while self.working:
            self._collect()
        self._encode_rest()

    def _send_handful(self) -> None:
        handful, self.handful = self.handful, []
        self.working.append((handful, self.decoders.submit(self._decode, handful)))

    @property
    def waited_s(self) -> float:
        """Seconds of a thread's time that went into waiting for a store."""
        return self.ahead.waited_s / self.job.workers + self.lookups_s

    @property
    def window(self) -> int:
        """Photos decoded or being decoded: enough that neither side waits for the other."""
        return 2 * self.job.chosen.batch_size + 2 * self.job.workers * self.together

    @property
    def longest_wait(self) -> int:
        """Rows held back, all batches on their way among them, before one is hurried."""
        return max(LONGEST_WAIT, 4 * self.window)

    def _decode(self, photos: list[Photo]) -> None:
        """Read, look up by content, decode: on a worker thread."""
        read: list[tuple[Photo, bytes]] = []
        for photo in photos:
            try:
                data, photo.stat = self.ahead.read(photo.path)
            except PhotoError as error:
                if not self.job.photos.readers:  # a store says itself that all of it is missing
                    self._check_missing(str(error))
                self._finish(photo, str(error))
                continue
            photo.digest = sha256(data).digest()
            if self._claim(photo):
                read.append((photo, data))
        self._settle_known([photo for photo, _ in read])
        mine = [(photo, data) for photo, data in read if not photo.done]
        outcomes = self.decoder.many([data for _, data in mine])
        for (photo, _), outcome in zip(mine, outcomes, strict=True):
            if isinstance(outcome, PhotoError):
                self._finish(photo, str(outcome))
            else:
                photo.pixels = outcome

    def _claim(self, photo: Photo) -> bool:
        """Whether this photo's bytes, met for the first time, are this thread's to look up.

        Those of another that is under way get its outcome.
        """
        with self.lock:
            twin = self.under_way.setdefault(photo.digest, photo)
            if twin is not photo:
                twin.twins.append(photo)
            return twin is photo

    def _settle_known(self, photos: list[Photo]) -> None:
        """Give those whose bytes are in the cache their outcome, without a wait for each other."""
        hits = self.cache.lookup_digests([photo.digest for photo in photos])
        for row, photo in enumerate(photos):
            if row in hits:
                self._finish(photo, hits[row], "same bytes", "same bytes")

    def _collect(self) -> None:
        """Wait for the handful that was sent first; what it decoded goes into batches."""
        photos, work = self.working.popleft()
        self._await(work)
        for photo in photos:
            if photo.pixels is not None:
                self.batch.append(photo)
            if self.batch and len(self.batch) == self.job.encoder.batch_rows:
                self._send_batch()

    def _await(self, work: Future[None]) -> None:
        """Wait for a photo; the error of a batch, or its own, comes out as soon as it is there."""
        while True:
            for batch in self.encoding:
                if batch.done():
                    batch.result()
            if work.done():
                return work.result()
            running = [batch for batch in self.encoding if not batch.done()]
            wait([work, *running], return_when=FIRST_COMPLETED)

    def _send_batch(self) -> None:
        """Have the batch encoded; waits while as many are on their way as can be worked on."""
        batch, self.batch = self.batch, []
        self.encoding.append(self.encoders.submit(self._encode, batch))
        while len(self.encoding) > self.batches_under_way:
            self._await(self.encoding[0])
            self.encoding.popleft()

    @property
    def batches_under_way(self) -> int:
        """One for each that encodes, and one that waits for the first of them."""
        return (self.job.workers if self.encoders is self.decoders else GPU_BATCHES) + 1

    def _encode_rest(self) -> None:
        """Encode what is there, be it less than a batch, and wait for all that is on its way."""
        if self.batch:
            self._send_batch()
        while self.encoding:
            self._await(self.encoding[0])
            self.encoding.popleft()

    def encode_pixels(self, pixels: "Sequence[torch.Tensor]") -> np.ndarray:
        """Unit vectors, float32 (rows, dim), of decoded photos, one at least; NaN: has none.

        Raises DeviceError.
        """
        from pipeline.encoder.tower import device_errors

        with device_errors(f"batch_size {self.job.chosen.batch_size}"):
            return self.job.encoder.encode(pixels)

    def _encode(self, batch: list[Photo]) -> None:
        """Encode a batch: on a worker thread."""
        vectors = self.encode_pixels([p.pixels for p in batch if p.pixels is not None])
        for photo, vec in zip(batch, vectors, strict=True):
            photo.pixels = None
            self._finish(photo, vec if np.isfinite(vec).all() else NO_VECTOR)

    def _finish(
        self,
        photo: Photo,
        outcome: Outcome,
        how: str = "encoded",
        twins_how: str = "same bytes in this run",
    ) -> None:
        """Give a photo and its twins their outcome and let the cache know."""
        with self.lock:
            self.under_way.pop(photo.digest, None)
            self._settle(photo, outcome, how)
            for twin in photo.twins:
                self._settle(twin, outcome, twins_how)

    def _settle(self, photo: Photo, outcome: Outcome, how: str) -> None:
        photo.how = how
        if self.over:
            return
        if photo.digest and photo.stat and _is_the_files(outcome):
            self.cache.add(Entry(photo.path or "", *photo.stat, photo.digest, outcome))
        photo.outcome = outcome


def _is_the_files(outcome: Outcome) -> bool:
    """Whether an outcome belongs to the bytes alone; limits and permissions may change."""
    return not isinstance(outcome, str) or outcome.startswith("broken:")


if __name__ == "__main__":
    command.run(main, "encode")
