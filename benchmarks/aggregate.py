"""Image vectors to listing vectors, projected too: images per second, and memory."""

import argparse

import numpy as np

from benchmarks import material, measure
from pipeline import aggregate
from pipeline.encoder import projection


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--images", type=int, default=200_000, help="two a listing")
    parser.add_argument("--dimensions", type=int, default=128, help="that vectors are projected to")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        encoded = material.encode_shard(folder / "encoded.parquet", args.images)
        chosen = material.defaults().model_copy(update=material.IDENTITY)
        flags = argparse.Namespace(
            encoded=[encoded], images=folder / "images.parquet",
            output=folder / "vectors.parquet", failures=folder / "failures.json",
            without_vector=folder / "without_vector.parquet", threads=args.threads,
        )  # fmt: skip
        drawn = np.random.default_rng(0).standard_normal((4096, 512))
        fit = projection.fit([drawn], args.dimensions)
        projecting = projection.write(folder / "pca.parquet", fit, material.ENCODER, {})
        with measure.memory() as memory:
            best = measure.fastest(
                args.rounds,
                aggregate=lambda: aggregate.aggregate(flags, chosen),
                projected=lambda: aggregate.aggregate(flags, chosen, projecting),
            )
    rate, projected = (args.images / best[name].wall for name in ("aggregate", "projected"))
    measure.say(
        f"{rate:.0f} images/s, projected {projected:.0f};"
        f" {memory.start:.0f} -> {memory.peak:.0f} MB"
    )
    measure.emit(
        "aggregate", images=args.images, images_per_second=rate,
        projected_images_per_second=projected, dimensions=args.dimensions,
        megabytes_before=memory.start, megabytes_peak=memory.peak,
    )  # fmt: skip


if __name__ == "__main__":
    main()
