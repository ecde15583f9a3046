"""Commands of Python in a tenth of the time that it takes to start them.

Each is a process of its own, forked from one that has imported what Snakemake and the commands
need, and nothing else: it has loaded no workflow and no settings and is connected to nothing.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["forked", "snakemake.cli", "snakemake.report", "smart_open", "polars", "duckdb",
     "adbc_driver_postgresql.dbapi", "pyarrow.parquet"]
)  # fmt: skip


def run(
    words: Sequence[str], folder: Path, env: Mapping[str, str], timeout_s: float
) -> tuple[int, str]:
    """Run `python -m words` in a folder to its end; its exit code, and what it said.

    TimeoutError after so many seconds.
    """
    with tempfile.NamedTemporaryFile("r") as said:
        process = _SERVER.Process(target=_become, args=(words, folder, dict(env), said.name))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{' '.join(words)}: {said.read()}")
        return process.exitcode, said.read()


def _become(words: Sequence[str], folder: Path, env: dict[str, str], said: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.path[0] = str(folder)
    sys.argv = list(words)
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which a process of this kind leaves out
