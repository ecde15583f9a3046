"""Feeding the encoder: files to pixels, no model; ours in threads, the plain way in processes.

What to expect: the decoder's own speed. A JPEG that is shrunk while it is decoded still has all
its bits to read, so beside `scaled` stands the bare decoder: the same shrinking, nothing else. How
far ahead of the plain way both are depends on the bits of a photo, hence the real ones.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simplejpeg
import torch
from PIL import Image

from benchmarks import material, measure, plain
from pipeline.encoder.model import full_preprocess
from pipeline.photos.pixels import Decode, Transform, jpeg_scale, load_pixels


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=[*material.SIZES], choices=material.SIZES)
    parser.add_argument(
        "--formats", nargs="+", default=[*material.FORMATS], choices=material.FORMATS
    )
    parser.add_argument("--images", type=int, default=24, help="photos of each size (jpg)")
    parser.add_argument("--others", type=int, default=8, help="photos of each size (other formats)")
    parser.add_argument("--photos", type=Path, help="folder of real photos, to be resized, too")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        for size in args.sizes:
            files = material.photos(folder, size, args.images)
            for kind in args.formats:
                few = files if kind == "jpg" else files[: args.others]
                made = few if kind == "jpg" else material.converted(folder / size, few, kind)
                measured(args, kind, size, "rendered", made)
            if args.photos:
                real = largest(material.own_photos(args.photos), args.images)
                measured(args, "jpg", size, "real, resized", material.fitted(folder, real, size))


def largest(paths: list[Path], count: int) -> list[Path]:
    """The photos of the most pixels, without those that cannot be read."""

    def pixels(path: Path) -> int:
        try:
            with Image.open(path) as image:
                image.load()
                return image.width * image.height
        except Exception:  # noqa: BLE001  Pillow raises all kinds
            measure.say(f"{path} cannot be read and is left out")
            return 0

    found = {path: pixels(path) for path in paths}
    if not any(found.values()):
        raise SystemExit("error: expected photos that can be read, found none; hint: --photos")
    return sorted((p for p in paths if found[p]), key=lambda p: found[p], reverse=True)[:count]


def measured(args, kind: str, size: str, photos: str, paths: list[Path]) -> None:  # type: ignore[no-untyped-def]
    """One line: images per second of each way to decode the same files."""
    # Every pass needs enough photos for all the cores to be busy to its end.
    paths = paths * max(1, 16 // len(paths))
    torch.set_num_threads(1)
    preprocess = full_preprocess({}, 224)
    transform = Transform.from_preprocess_cfg(preprocess)
    width, height = material.SIZES[size]
    scale = jpeg_scale((height, width), transform, "scaled", orientation=1)
    batches = plain.loader(paths, plain.transform_of(preprocess), args.threads)
    plain.decode(batches)  # starts the processes

    def ours(decode: Decode) -> None:
        def pixels(path: Path) -> None:
            load_pixels(path.read_bytes(), transform, decode, True, 10**9)

        list(pool.map(pixels, paths))

    def bare() -> None:
        def pixels(path: Path) -> None:
            simplejpeg.decode_jpeg(
                path.read_bytes(), min_width=width // scale, min_height=height // scale
            )

        list(pool.map(pixels, paths))

    with ThreadPoolExecutor(args.threads) as pool:
        best = measure.fastest(
            args.rounds,
            plain=lambda: plain.decode(batches),
            full=lambda: ours("full"),
            **({"scaled": lambda: ours("scaled"), "bare": bare} if kind.startswith("jpg") else {}),
        )
    rate = {name: len(paths) / timing.wall for name, timing in best.items()}
    rates = "".join(f"  {name} {r:7.1f}" for name, r in rate.items())
    measure.say(f"{kind:<16}{size:>6} {photos:<13}{rates} images/s")
    measure.emit(
        "decode", format=kind, size=size, photos=photos, megabytes=measure.megabytes(paths),
        **{f"{name}_images_per_second": r for name, r in rate.items()},
        **{f"{name}_ratio": r / rate["plain"] for name, r in rate.items() if name != "plain"},
        **{f"{name}_cpu_ratio": best["plain"].cpu / t.cpu
           for name, t in best.items() if name != "plain"},
    )  # fmt: skip


if __name__ == "__main__":
    main()
