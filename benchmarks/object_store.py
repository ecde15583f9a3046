"""The encode stage from a folder and from an object store that answers late, side by side.

The store is a server on this machine, which waits before it answers; what it takes of the cores is
the encoder's loss, too, and is told apart. Every round encodes all photos anew from both.
"""

import os
import subprocess
import sys
import time
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
            waited: list[float | None] = []
            own: list[float] = []  # processor time, without the server's

            def run(job: EncodeJob) -> None:
                """Encode every photo into a cache of its own."""
                cache = folder / f"cache-{time.time_ns()}"
                chosen = job.chosen.model_copy(update={"cache_dir": str(cache)})
                before = time.process_time()
                stats = encode.encode(selected, folder / "encoded.parquet", chosen, job)
                own.append(time.process_time() - before)
                assert stats.how["encoded"] == len(photos)
                waited.append(stats.waited)

            rounds = []
            for _ in range(args.rounds):
                took = measure.fastest(
                    1, folder=lambda: run(jobs["folder"]), store=lambda: run(jobs["store"])
                )
                rounds.append(took)
                measure.say(
                    f"folder {len(photos) / took['folder'].wall:.1f} images/s, store"
                    f" {took['folder'].wall / took['store'].wall:.0%} of it in time,"
                    f" {own[-2] / own[-1]:.0%} in processor time; {waited[-1] or 0:.1%} waited"
                )
    best = {name: min(took[name].wall for took in rounds) for name in jobs}
    servers_s = median(took["store"].cpu for took in rounds) - median(own[1::2])
    measure.emit(
        "object store", images=len(photos), late_s=args.late_s,
        folder_images_per_second=len(photos) / best["folder"],
        store_images_per_second=len(photos) / best["store"],
        ratio=round(median(t["folder"].wall / t["store"].wall for t in rounds), 3),
        ratio_of_processor_time=round(median(own[::2]) / median(own[1::2]), 3),
        servers_share_of_processor_time=round(servers_s / median(own[1::2]), 3),
        waited=round(median(share for share in waited if share is not None), 4),
    )  # fmt: skip


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
