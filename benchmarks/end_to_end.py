"""Files to rows of the table: ours, the plain way, and the bound of the machine.

ViT-B-32 with weights from a fixed seed, loaded before the clock starts. Ours is encode, aggregate
and load; the bound is decoding alone plus encoding alone, each on all cores.
"""

import argparse
import itertools
import shutil
from pathlib import Path

import open_clip
import torch

from benchmarks import material, measure, plain
from pipeline import aggregate, benchmark, encode, load
from pipeline.encode import EncodeJob, Line
from pipeline.stage import parquet


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=[*material.SIZES], choices=material.SIZES)
    parser.add_argument("--images", type=int, default=256, help="photos of each size")
    parser.add_argument("--photos", type=Path, help="these photos instead")
    parser.add_argument("--decode", default="scaled", choices=["full", "scaled"])
    args = parser.parse_args()
    with material.work_folder(args.work) as folder, material.database(folder):
        if args.photos:
            paths = material.own_photos(args.photos)[: args.images]
            compare(args, folder, args.photos.name, args.photos, paths)
            return
        for size in args.sizes:
            paths = material.photos(folder, size, args.images)
            compare(args, folder, size, paths[0].parent.parent, paths)


def compare(
    args: argparse.Namespace, folder: Path, name: str, root: Path, paths: list[Path]
) -> None:
    """One line for these photos."""
    model = material.vit(folder)
    job = material.job(
        root, folder / "cache", args.threads, model_name=model, decode=args.decode, device="cpu"
    )
    ours = Ours(folder / "job", job, [str(path.relative_to(root)) for path in paths])
    clip = open_clip.create_model(model, load_weights=True).eval()
    batches = plain.loader(paths, plain.transform_of(job.encoder.preprocess), args.threads)
    listings = [row // 4 for row in range(len(paths))]

    def theirs() -> None:
        torch.set_num_threads(args.threads)
        plain.embed(batches, clip.encode_image, listings)

    plain.decode(batches)  # starts the processes
    apart = {"decode": float("inf"), "encode": float("inf")}
    best = {"ours": measure.Timing(), "plain": measure.Timing(), "apart": measure.Timing()}
    for _ in range(args.rounds):
        once = measure.fastest(1, plain=theirs, apart=lambda: ours.apart(apart), ours=ours.run)
        best = {
            k: measure.Timing(min(best[k].wall, t.wall), min(best[k].cpu, t.cpu))
            for k, t in once.items()
        }
    n = len(paths)
    bound = n / (apart["decode"] + apart["encode"])
    measure.say(
        f"{name}: plain {n / best['plain'].wall:.1f}, ours {n / best['ours'].wall:.1f},"
        f" bound {bound:.1f} images/s (decode {n / apart['decode']:.1f},"
        f" encode {n / apart['encode']:.1f})"
    )
    measure.emit(
        "end to end", photos=name, decode=args.decode, images=n, threads=args.threads,
        plain_images_per_second=n / best["plain"].wall,
        images_per_second=n / best["ours"].wall,
        bound_images_per_second=bound,
        ratio=best["plain"].wall / best["ours"].wall,
        share_of_bound=n / best["ours"].wall / bound,
        cpu_ratio=best["plain"].cpu / best["ours"].cpu,
        cpu_share_of_bound=best["apart"].cpu / best["ours"].cpu,
    )  # fmt: skip


class Ours:
    """The stages from a select shard to the table, each time from an empty cache."""

    def __init__(self, folder: Path, job: EncodeJob, storage_paths: list[str]) -> None:
        self.folder = folder
        self.job = job
        self.storage_paths = storage_paths
        self.numbers = itertools.count()

    def run(self) -> None:
        """Encode, aggregate and load."""
        shutil.rmtree(self.job.chosen.cache_dir, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        made = {n: self.folder / f"{n}.parquet" for n in ("selected", "encoded", "vectors")}
        material.select_shard(made["selected"], self.storage_paths)
        encode.encode(made["selected"], made["encoded"], self.job.chosen, self.job)
        failures, images = self.folder / "failures.json", self.folder / "images.parquet"
        without_vector = self.folder / "without_vector.parquet"
        revision = {"model_rev": f"benchmark-{next(self.numbers)}", "source": self.folder.name}
        chosen = self.job.chosen.model_copy(update=revision)
        aggregate.aggregate(
            argparse.Namespace(
                encoded=[made["encoded"]],
                output=made["vectors"],
                failures=failures,
                without_vector=without_vector,
                images=images,
                threads=self.job.threads,
            ),
            chosen,
        )
        with parquet.writer(images, parquet.LISTINGS, {}):
            pass
        receipt = self.folder / "receipt.json"
        load.load(
            argparse.Namespace(
                vectors=made["vectors"],
                without_vector=without_vector,
                listings=images,
                receipt=receipt,
            ),
            chosen,
            material.environment(),
        )

    def apart(self, best: dict[str, float]) -> None:
        """Each stage alone; `best` keeps the fewest seconds of each."""
        with Line(self.job, benchmark.NoCache(self.job.dim)) as line:
            took = benchmark.time_apart([*self.storage_paths], self.job, line)
        for stage in best:
            best[stage] = min(best[stage], took[stage])


if __name__ == "__main__":
    main()
