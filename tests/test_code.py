"""The digests by which an edit of the code reruns a stage."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline.workflow import code as code_module
from pipeline.workflow.code import UNDECIDING, code, deciding

PIPELINE = REPOSITORY / "pipeline"
STAGES = ("export", "select", "encode", "aggregate", "load", "benchmark", "evaluate")


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_loads_is_in_its_digest_or_listed(stage: str) -> None:
    """Each module that a stage really loads decides what it writes, or is listed with a reason."""
    program = f"import sys, pipeline.{stage}; print(*[m for m in sys.modules if 'pipeline.' in m])"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.split()
    files = [f"{name.removeprefix('pipeline.').replace('.', '/')}.py" for name in loaded]
    modules = {name for name in files if (PIPELINE / name).is_file()}

    assert f"{stage}.py" in modules
    assert set() == modules - set(deciding(stage)) - UNDECIDING.keys()


def test_every_file_decides_or_is_listed() -> None:
    """A new module or SQL file that no stage uses is named with the reason; none is for nothing."""
    files = {
        path.relative_to(PIPELINE).as_posix()
        for suffix in ("py", "sql")
        for path in PIPELINE.rglob(f"*.{suffix}")
    }
    deciding_some = {name for stage in STAGES for name in deciding(stage)}
    above = {name for name in files if name.startswith(("workflow/", "__main__.py"))}
    titles = {name for name in files if name.endswith("__init__.py")}

    assert set() == files - deciding_some - UNDECIDING.keys() - above - titles
    assert [] == sorted(UNDECIDING.keys() - files)
    assert [] == sorted(UNDECIDING.keys() & deciding_some)


def test_what_is_imported_late_counts() -> None:
    """Modules that are imported inside of functions, and SQL that is read from files."""
    assert {"encoder/tower.py", "encoder/model.py", "photos/pixels.py", "stage/parquet.py"} <= set(
        deciding("encode")
    )
    assert {"database/registry.sql", "database/waiting.py", "database/connection.py"} <= set(
        deciding("load")
    )
    assert {"select.py", "stage/parquet.py"} == set(deciding("select"))


def test_the_rooms_titles_decide_nothing() -> None:
    """An __init__.py has a docstring and nothing else, so that no digest needs it."""
    more = [
        str(path)
        for path in PIPELINE.rglob("__init__.py")
        for body in [ast.parse(path.read_text()).body]
        if [ast.Expr] != [type(statement) for statement in body]
    ]

    assert [] == more


def test_two_checkouts_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes in another folder with other mtimes have the same digest; an edit has not."""
    copy = tmp_path / "elsewhere" / "pipeline"
    shutil.copytree(PIPELINE, copy, copy_function=shutil.copyfile)
    os.utime(copy / "load.py", ns=(1, 1))
    here = {stage: code(stage) for stage in STAGES}
    monkeypatch.setattr(code_module, "PIPELINE", copy)
    there = {stage: code(stage) for stage in STAGES}
    changed = {}
    for name in (
        "stage/parquet.py",
        "photos/files.py",
        "database/registry.sql",
        "cache/vectors.py",
    ):
        text = (copy / name).read_bytes()
        (copy / name).write_bytes(text + b"\n")
        changed[name] = [stage for stage in STAGES if code(stage) != here[stage]]
        (copy / name).write_bytes(text)

    assert here == there
    assert {
        "stage/parquet.py": list(STAGES),
        "photos/files.py": ["export", "encode", "aggregate", "load", "benchmark", "evaluate"],
        "database/registry.sql": ["load"],
        "cache/vectors.py": [],
    } == changed
