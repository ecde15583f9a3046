"""Memory over a long shard of small photos: first all encoded, then all from the cache."""

import shutil
from pathlib import Path

from benchmarks import material, measure
from pipeline import encode
from pipeline.encode import EncodeJob


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--images", type=int, default=100_000, help="photos of 64 x 48 pixels")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        root = material.small_photos(folder, args.images)
        names = [str(material.small_name(root, n).relative_to(root)) for n in range(args.images)]
        selected = material.select_shard(folder / "long.parquet", names)
        job = material.job(
            root, folder / "long-cache", args.threads, model_name=material.tiny(folder),
            device="cpu",
        )  # fmt: skip
        shutil.rmtree(job.chosen.cache_dir, ignore_errors=True)
        for what in ("encoded", "hits"):
            watch(what, selected, folder / "encoded.parquet", job, args.images)


def watch(what: str, selected: Path, encoded: Path, job: EncodeJob, images: int) -> None:
    """One line: the most memory up to some shares of the time."""
    with measure.memory() as memory:
        stats = encode.encode(selected, encoded, job.chosen, job)
    marks = {f"{share:.0%}": round(memory.after(share)) for share in (0.02, 0.25, 0.5, 0.75, 1)}
    measure.say(f"{stats}; megabytes up to {marks}")
    measure.emit(
        "memory", what=what, images=images, images_per_second=images / stats.seconds,
        megabytes_at=marks,
    )  # fmt: skip


if __name__ == "__main__":
    main()
