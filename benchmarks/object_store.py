"""The encode stage from a folder and from an object store that answers late, side by side.

The store is a server on this machine, which waits before it answers; what it and its answers take
of the cores is the encoder's loss, too. Every round encodes all photos anew, first from the one,
then from the other.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks import material, measure
from demo.store import BUCKET, Server
from pipeline import encode
from pipeline.encode import EncodeJob


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--images", type=int, default=256, help="2 MP photos")
    parser.add_argument("--late-s", type=float, default=0.2, help="seconds before an answer")
    parser.add_argument("--decode", default="scaled", choices=["full", "scaled"])
    parser.set_defaults(rounds=3)
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        photos = material.photos(folder, "2 MP", args.images)
        root = photos[0].parent.parent
        selected = material.select_shard(
            folder / "selected.parquet", [str(path.relative_to(root)) for path in photos]
        )
        with serving(root, args.late_s):
            jobs = {
                name: material.job(
                    place, folder / "unused", args.threads, model_name=material.vit(folder),
                    decode=args.decode, device="cpu",
                )
                for name, place in (("folder", root), ("store", f"s3://{BUCKET}"))
            }  # fmt: skip
            encoder = jobs["folder"].encoder  # loaded once, before the clock starts
            vars(jobs["store"])["encoder"] = encoder
            rates: dict[str, list[float]] = {name: [] for name in jobs}
            waited = []
            for number in range(args.rounds):
                for name, job in jobs.items():
                    stats = run(job, selected, folder, f"{name}-{os.getpid()}-{number}")
                    rates[name].append(stats.images / stats.seconds)
                waited.append(stats.waited or 0.0)
                ratio = rates["store"][-1] / rates["folder"][-1]
                measure.say(
                    f"folder {rates['folder'][-1]:.1f}, store {rates['store'][-1]:.1f} images/s:"
                    f" {ratio:.0%}; {waited[-1]:.0%} of the time waited"
                )
    ratios = [there / here for here, there in zip(*rates.values(), strict=True)]
    measure.emit(
        "object store", images=len(photos), late_s=args.late_s,
        folder_images_per_second=max(rates["folder"]), store_images_per_second=max(rates["store"]),
        ratio=median(ratios), ratios=[round(ratio, 3) for ratio in ratios],
        waited=round(median(waited), 3),
    )  # fmt: skip


def run(job: EncodeJob, selected: Path, folder: Path, cache: str) -> encode.Stats:
    """Encode every photo into a cache of its own."""
    chosen = job.chosen.model_copy(update={"cache_dir": str(folder / cache)})
    stats = encode.encode(selected, folder / "encoded.parquet", chosen, job)
    assert stats.how["encoded"] == stats.images
    return stats


@contextmanager
def serving(root: Path, late_s: float) -> Iterator[None]:
    """The photos below a folder in a store, which the environment leads to."""
    words = [sys.executable, "-m", "demo.store", str(root), "--late-s", str(late_s)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        os.environ |= Server(process.stdout.readline().strip()).variables
        yield
        process.stdin.close()


if __name__ == "__main__":
    main()
