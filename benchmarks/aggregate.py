"""Image vectors to listing vectors: images per second, and memory."""

import argparse

from benchmarks import material, measure
from pipeline import aggregate


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--images", type=int, default=200_000, help="two a listing")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        encoded = material.encode_shard(folder / "encoded.parquet", args.images)
        chosen = material.defaults().model_copy(update=material.IDENTITY)
        flags = argparse.Namespace(
            encoded=[encoded], images=folder / "images.parquet",
            output=folder / "vectors.parquet", failures=folder / "failures.json",
            without_vector=folder / "without_vector.parquet", threads=args.threads,
        )  # fmt: skip
        with measure.memory() as memory:
            best = measure.fastest(
                args.rounds, aggregate=lambda: aggregate.aggregate(flags, chosen)
            )
    rate = args.images / best["aggregate"].wall
    measure.say(f"{rate:.0f} images/s, {memory.start:.0f} -> {memory.peak:.0f} MB")
    measure.emit(
        "aggregate", images=args.images, images_per_second=rate,
        megabytes_before=memory.start, megabytes_peak=memory.peak,
    )  # fmt: skip


if __name__ == "__main__":
    main()
