"""`make mutants`: puts small faults into the code, one at a time, and shows those no test sees.

The faults are mutmut's, in a copy of the tree below mutants/; pyproject.toml says where, and which
tests are to see them. What is no fault stands in mutants.toml. Exits with 1 if there are others.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path

from demo.postgres import create_database, embedded_postgres

MUTMUT = Path(sys.executable).with_name("mutmut")
UNSEEN = ("survived", "no tests", "suspicious", "not checked")


def main() -> int:
    """Test all mutants anew, or only those whose names match the words of the command."""
    names = sys.argv[1:]
    if not names:
        shutil.rmtree("mutants", ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        embedded_postgres(server := Path(folder, "postgres")),
    ):
        create_database(server, "with_pgvector")  # the one that conftest.py copies
        environment = {k: v for k, v in os.environ.items() if k != "LISTING_PHOTOS_DIR"}
        environment |= {
            "PATH": f"{MUTMUT.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTEST_DEBUG_TEMPROOT": folder,
            "TEST_SERVER": str(server),  # one for all: each would start its own
            "TEST_SECONDS": str(Path("mutants/mutmut-stats.json").resolve()),
        }
        subprocess.run([MUTMUT, "run", *names], env=environment, check=True)
    return report(names or ["*"])


def report(names: list[str]) -> int:
    """Count the mutants by module and end, and show those that nothing sees and nobody explains."""
    lines = [line.strip().rsplit(": ", 1) for line in mutmut("results", "--all", "1").splitlines()]
    ends = {n: end for n, end in lines if any(fnmatch.fnmatch(n, name) for name in names)}
    for (module, end), count in sorted(
        Counter((n.rpartition(".")[0], e) for n, e in ends.items()).items()
    ):
        print(f"{module:30} {count:4} {end}")
    for name in (name for name, end in ends.items() if end == "timeout"):
        print(f"{name}: ran out of time, as a sound one may on a machine that is busy")
    explained = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    unexplained = 0
    for name in (name for name, end in ends.items() if end in UNSEEN):
        diff = mutmut("show", name)
        became = " ".join(re.findall(r"^\+(?!\+\+) *(.*)", diff, re.M))
        entries = {**explained["*"], **explained.get(name.partition("__mutmut_")[0], {})}
        if not any(fits(pattern, became) for pattern in entries):
            unexplained += 1
            print(diff)
    print(f"{unexplained} of {len(ends)} mutants: neither seen by a test nor explained")
    return int(unexplained > 0)


def fits(pattern: str, line: str) -> bool:
    """Whether the line as changed is this one; three dots stand for anything."""
    return bool(re.fullmatch(".*".join(map(re.escape, pattern.split("..."))), line))


def mutmut(*words: str) -> str:
    return subprocess.run([MUTMUT, *words], stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
