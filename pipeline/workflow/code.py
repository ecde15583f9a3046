"""Which code decides what a stage writes: an edit of it reruns the stage and what follows.

Snakemake does not see an edit to a module behind `shell:`, so a digest of the code is a param.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

PIPELINE = Path(__file__).parents[1]

# What stages use that decides nothing of what they write. All else that they import counts.
UNDECIDING = {
    "stage/command.py": "what is said, where, and how a process ends",
    "stage/errors.py": "the words of what ends a stage",
    "stage/lifetime.py": "when a stage ends before its time",
    "stage/lock.py": "who may write when",
    "stage/settings.py": "its values reach the stages as flags, and those are params",
    "cache/vectors.py": "a hit is what encoding would give",
    "cache/parts.py": "likewise",
    "cache/index.py": "likewise",
    "cache/prune.py": "no stage: used by hand",
    "database/census.py": "what is said of who is left out",
    "report.py": "made anew each time that it is asked for",
    "search.py": "no stage: asked by hand",
    "retrieval/compare.py": "likewise",
    "pages/template.py": "of the report, the evaluation and the search",
    "pages/plots.py": "likewise",
    "photos/thumbnail.py": "likewise",
    "encoder/text.py": "likewise",
    "database/neighbours.py": "likewise",
    "database/sample.py": "likewise",
    "database/current.sql": "likewise",
    "database/listing.py": "no stage: looked at by hand",
    "database/rights.py": "asked before any work is done",
    "index.py": "an index changes no row",
    "pca.py": "no stage: used by hand, and the file that it writes is in the params",
    "database/hnsw.py": "likewise",
    "database/obsolete.py": "no stage: used by hand",
    "database/inputs.sql": "no stage: makes tables for a trial",
    "database/target.sql": "no stage: makes the table, whose shape each run checks",
    "database/role.sql": "no stage: printed for an owner",
}


def code(stage: str) -> str:
    """A digest of the code that decides what a stage writes; mtimes play no part."""
    digest = hashlib.sha256()
    for name in deciding(stage):
        digest.update(f"{name}\n".encode() + (PIPELINE / name).read_bytes())
    return digest.hexdigest()[:12]


def deciding(stage: str) -> list[str]:
    """The files that decide what a stage writes: all that it imports or runs, but UNDECIDING."""
    found: set[str] = set()
    new = {f"{stage}.py"}
    while new:
        found |= new
        new = {name for file in new for name in _used_by(PIPELINE / file)} - found
        new -= UNDECIDING.keys()
    return sorted(found)


@functools.cache
def _used_by(file: Path) -> frozenset[str]:
    """The modules and SQL files of the pipeline that a file names, also inside of functions."""
    if file.suffix != ".py":
        return frozenset()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return frozenset(name for node in ast.walk(tree) for name in _named(node, file.parent))


def _named(node: ast.AST, folder: Path) -> Iterator[str]:
    places = []
    if isinstance(node, ast.Constant) and str(node.value).endswith(".sql"):
        places = [folder / str(node.value)]
    elif isinstance(node, ast.Import):
        places = [_module(alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        whole = [_module(f"{node.module}.{alias.name}") for alias in node.names]
        places = [_module(node.module), *whole]
    for place in places:
        if place.is_relative_to(PIPELINE) and place.is_file():
            yield place.relative_to(PIPELINE).as_posix()


def _module(dotted: str) -> Path:
    return PIPELINE.parent / f"{dotted.replace('.', '/')}.py"
