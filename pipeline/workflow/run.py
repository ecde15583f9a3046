"""The whole job with one command: the flags of a script, the work of Snakemake.

Prints the equal `snakemake` command and becomes it. Only flags that were given are passed on, so
config.yaml decides the rest.
"""

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path

from pipeline.database.connection import data_source_name
from pipeline.stage.errors import SettingsError
from pipeline.stage.settings import Settings

# flag on the command line: setting in config.yaml
_VALUES = {
    "limit-listings": int, "topk": int, "model-name": str, "pretrained": str, "source": str,
    "model-rev": str, "pca-rev": str, "pca": str, "batch-size": int, "num-workers": int,
    "device": str, "benchmark-images": int,
}  # fmt: skip


# Texts that Snakemake's --config takes as they are: nothing like a number, a bool or YAML.
_PLAIN = re.compile(r"(?i)(?!(?:true|false|nan|inf|infinity)$)[a-z](?:[\w./-]|:(?=[\w./]))*")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags; a default shown here is config.yaml's, and is used when neither says more."""
    parser.formatter_class = argparse.HelpFormatter
    parser.epilog = "What follows -- goes to snakemake as it is: -- --set-scatter encode=64"
    for flag, kind in _VALUES.items():
        field = Settings.model_fields[flag.replace("-", "_")]
        parser.add_argument(
            f"--{flag}", type=kind, metavar="N" if kind is int else "TEXT",
            help=f"{field.description} (default: {field.default!r})",
        )  # fmt: skip
    for setting in ("stock", "screenshots"):
        what = Settings.model_fields[f"exclude_{setting}"].description
        either = parser.add_mutually_exclusive_group()
        either.add_argument(
            f"--exclude-{setting}", dest=f"exclude_{setting}", action="store_const", const=True,
            help=f"{what} (the default)",
        )  # fmt: skip
        either.add_argument(
            f"--include-{setting}", dest=f"exclude_{setting}", action="store_const", const=False,
            help=f"keep {setting.replace('stock', 'stock photos')}",
        )  # fmt: skip
    fp16 = parser.add_mutually_exclusive_group()
    fp16.add_argument("--fp16", dest="precision", action="store_const", const="fp16",
                      help="half precision (the default on CUDA)")  # fmt: skip
    fp16.add_argument("--no-fp16", dest="precision", action="store_const", const="fp32",
                      help="single precision (the default elsewhere)")  # fmt: skip
    parser.add_argument("--force", action="store_true",
                        help="embed every eligible listing again and overwrite it")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="everything but the load: no row is written")  # fmt: skip
    parser.add_argument("--cores", default="all", metavar="N|all", help="CPU cores (default: all)")
    parser.add_argument("snakemake", nargs="*", metavar="-- ...", help="more for snakemake")


def main(args: argparse.Namespace) -> None:
    """Check the settings, print the snakemake command, run it in this process's place."""
    words = snakemake_command(args)
    print("$ " + shlex.join(words), flush=True)
    data_source_name()
    try:
        os.execv(sys.executable, [sys.executable, "-m", *words])
    except OSError as error:
        raise SettingsError("snakemake", str(error), "", "pip install -e .") from None


def snakemake_command(args: argparse.Namespace) -> list[str]:
    """The words of the equal snakemake command."""
    names = [flag.replace("-", "_") for flag in _VALUES]
    names += ["exclude_stock", "exclude_screenshots", "precision"]
    given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if args.force:
        given["force"] = True
    Settings.check(given, "command line")
    words = ["snakemake", target_of(args), "--cores", str(args.cores)]
    snakefile = Path(__file__).parents[2] / "Snakefile"
    if not Path("Snakefile").exists():
        words += ["--snakefile", str(snakefile)]
    if given:
        words += ["--config", *(f"{name}={_as_yaml(value)}" for name, value in given.items())]
    if args.force:
        words += ["--forcerun", "export"]
    return [*words, *args.snakemake]


def _as_yaml(value: object) -> str:
    """A value as Snakemake reads it from --config: quoted if it would take the text for more."""
    if not isinstance(value, str) or _PLAIN.fullmatch(value):
        return str(value)
    # Snakemake strips quotes at the very ends before YAML sees them; blanks keep them in.
    return f" {json.dumps(value, ensure_ascii=False)} "


def target_of(args: argparse.Namespace) -> str:
    """Which of the Snakefile's targets the flags ask for."""
    if args.benchmark_images is not None:
        return "benchmark"
    return "vectors" if args.dry_run else "all"
