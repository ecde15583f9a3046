"""The house: which room may look into which."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from conftest import REPOSITORY

# From the top floor down: a module imports from its own room and from those behind it, never up.
FLOORS = (
    "workflow", "stages", "retrieval", "pages", "database", "photos", "encoder", "cache", "stage",
)  # fmt: skip


def imported(file: Path) -> Iterator[str]:
    """The dotted names that a file imports anywhere in it, of packages in this repository."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """The room of a dotted name below pipeline; a module on top is a stage."""
    name = module.split(".")[1]
    return name if (REPOSITORY / "pipeline" / name).is_dir() else "stages"


def test_the_rooms_import_downwards() -> None:
    """No module imports from a room above its own; only __main__ sees all of them."""
    upward = []
    for file in sorted((REPOSITORY / "pipeline").rglob("*.py")):
        name = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
        if file.name in ("__main__.py", "__init__.py"):
            continue
        for other in imported(file):
            if other.startswith("pipeline.") and FLOORS.index(room(other)) < FLOORS.index(
                room(name)
            ):
                upward.append((name, other))

    assert [] == upward


def test_the_pipeline_stands_without_what_stands_on_it() -> None:
    """Demo, benchmarks and tests import the pipeline; it imports none of them."""
    above = ("demo", "benchmarks", "tests", "conftest")
    found = [
        (str(file), name)
        for file in (REPOSITORY / "pipeline").rglob("*.py")
        for name in imported(file)
        if name.split(".")[0] in above
    ]

    assert [] == found


def test_encode_knows_no_database_and_the_database_no_torch() -> None:
    """What a stage loads is what it needs: no driver where vectors are made, no torch in SQL."""

    def loaded(module: str) -> set[str]:
        code = f"import sys, {module}; print(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        return set(done.stdout.split()) & {"adbc_driver_manager", "torch", "open_clip", "snakemake"}

    assert set() == loaded("pipeline.encode")
    assert {"adbc_driver_manager"} == loaded("pipeline.load")
    assert {"adbc_driver_manager"} == loaded("pipeline.workflow.plan")
