"""Feeding the encoder: files to pixels, no model; ours in threads, the plain way in processes.

What to expect: the decoder's own speed, which `decode: full` pays for every pixel; a JPEG that is
shrunk while it is decoded still has all its bits to read.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import material, measure, plain
from pipeline.image import Decode, Transform, load_pixels
from pipeline.model import full_preprocess


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=[*material.SIZES], choices=material.SIZES)
    parser.add_argument(
        "--formats", nargs="+", default=[*material.FORMATS], choices=material.FORMATS
    )
    parser.add_argument("--images", type=int, default=24, help="photos of each size (jpg)")
    parser.add_argument("--others", type=int, default=8, help="photos of each size (other formats)")
    parser.add_argument("--photos", type=Path, help="these photos instead, in their own format")
    args = parser.parse_args()
    if args.photos:
        measured(args, "as they are", args.photos.name, material.own_photos(args.photos))
        return
    with material.work_folder(args.work) as folder:
        for size in args.sizes:
            files = material.photos(folder, size, args.images)
            for kind in args.formats:
                few = files if kind == "jpg" else files[: args.others]
                made = few if kind == "jpg" else material.converted(folder / size, few, kind)
                # every pass needs enough photos for all the cores to be busy to its end
                measured(args, kind, size, made * max(1, 16 // len(made)))


def measured(args, kind: str, size: str, paths: list[Path]) -> None:  # type: ignore[no-untyped-def]
    """One line: images per second of three ways to decode the same files."""
    torch.set_num_threads(1)
    preprocess = full_preprocess({}, 224)
    transform = Transform.from_preprocess_cfg(preprocess)
    batches = plain.loader(paths, plain.transform_of(preprocess), args.threads)
    plain.decode(batches)  # starts the processes

    with ThreadPoolExecutor(args.threads) as pool:

        def ours(decode: Decode) -> None:
            def pixels(path: Path) -> None:
                load_pixels(path.read_bytes(), transform, decode, True, 10**9)

            for _ in pool.map(pixels, paths):
                pass

        best = measure.fastest(
            args.rounds,
            plain=lambda: plain.decode(batches),
            full=lambda: ours("full"),
            scaled=lambda: ours("scaled"),
        )
    rate = {name: len(paths) / timing.wall for name, timing in best.items()}
    measure.say(
        f"{kind:<16}{size:>6}  plain {rate['plain']:7.1f}  full {rate['full']:7.1f}"
        f"  scaled {rate['scaled']:7.1f} images/s"
    )
    measure.emit(
        "decode",
        format=kind,
        size=size,
        megabytes=measure.megabytes(paths),
        **{f"{name}_images_per_second": r for name, r in rate.items()},
        full_ratio=rate["full"] / rate["plain"],
        scaled_ratio=rate["scaled"] / rate["plain"],
        full_cpu_ratio=best["plain"].cpu / best["full"].cpu,
        scaled_cpu_ratio=best["plain"].cpu / best["scaled"].cpu,
    )


if __name__ == "__main__":
    main()
