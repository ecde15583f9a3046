"""Draw the rules into a Markdown file: `python -m demo.rulegraph README.md`.

Snakemake asks the database while it builds its graph, so an empty one is started for it.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from demo import encoder, postgres
from pipeline.database import target
from pipeline.stage import command
from pipeline.stage.settings import Environment

FENCE = re.compile(r"```mermaid\n.*?```", re.S)


def main() -> None:
    """Replace the file's Mermaid block by the graph of the rules as they are."""
    page = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        graph = _graph(Path(folder))
    page.write_text(FENCE.sub(lambda _: f"```mermaid\n{graph}\n```", page.read_text(), count=1))


def _graph(folder: Path) -> str:
    with postgres.embedded_postgres(folder / "postgres"):
        os.environ["PG_DSN"] = postgres.create_database(folder / "postgres", "rules")
        target.create_tables(Environment.read({}), encoder.DIM, inputs=True)
        words = [
            "snakemake", "results/load/receipt.json", "benchmark", "--directory", str(folder),
            "--config", f"cache_dir={folder}", "--rulegraph", "mermaid-js",
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", *words], check=True, stdout=subprocess.PIPE, text=True
        )
    return done.stdout[done.stdout.index("---") :].strip()


if __name__ == "__main__":
    command.run(main, "rulegraph")
