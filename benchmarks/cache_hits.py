"""Listings edited, photos unchanged: the time per image, beside that of encoding it.

Every image is looked up by its path, size and mtime; no file is read, decoded or encoded.
"""

import subprocess
import sys
import time

from benchmarks import material, measure
from pipeline import encode


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--images", type=int, default=20_000, help="photos in the cache")
    parser.add_argument("--encoded", type=int, default=64, help="2 MP photos, encoded by ViT-B-32")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        root = material.small_photos(folder, args.images)
        names = [str(material.small_name(root, n).relative_to(root)) for n in range(args.images)]
        hits = material.job(
            root, folder / "cache", args.threads, model_name=material.tiny(folder), device="cpu"
        )
        selected = material.select_shard(folder / "hits.parquet", names)
        encoded = folder / "encoded.parquet"
        encode.encode(selected, encoded, hits.chosen, hits)  # fills the cache
        command = [
            sys.executable, "-c", "import sys; from pipeline import encode;"
            " assert 'torch' not in sys.modules",
        ]  # fmt: skip
        best = measure.fastest(
            args.rounds,
            hits=lambda: encode.encode(selected, encoded, hits.chosen, hits),
            start=lambda: subprocess.run(command, check=True),
        )
        stats = encode.encode(selected, encoded, hits.chosen, hits).as_dict()
        assert (stats["encoded"], stats["saved"]["same file"]) == (0, args.images)

        photos = material.photos(folder, "2 MP", args.encoded)
        fresh = material.job(
            photos[0].parent.parent, folder / f"cache-{time.time_ns()}", args.threads,
            model_name=material.vit(folder), device="cpu", decode="scaled",
        )  # fmt: skip
        assert fresh.encoder.dim
        paths = [str(p.relative_to(fresh.photos.root)) for p in photos]
        shard = material.select_shard(folder / "fresh.parquet", paths)
        encoding = measure.seconds(lambda: encode.encode(shard, encoded, fresh.chosen, fresh))
    per_hit, per_encode = best["hits"].wall / args.images, encoding / len(photos)
    measure.say(
        f"{1 / per_hit:.0f} hits/s, {1 / per_encode:.1f} encoded/s: {per_encode / per_hit:.0f}x"
    )
    measure.emit(
        "cache hits", images=args.images, hits_per_second=1 / per_hit,
        encoded_per_second=1 / per_encode, ratio=per_encode / per_hit,
        start_seconds=best["start"].wall,
    )  # fmt: skip


if __name__ == "__main__":
    main()
