"""The Makefile: what `make setup` would do, told by `make -n`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that is set up: the Makefile, what it reads, and a venv without packages."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=folder, check=True)
    (folder / ".venv/ready").touch()
    return folder


def would_do(folder: Path) -> list[str]:
    """What `make setup` would run in a folder when typed by hand, not below `make test`."""
    typed = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(
        ["make", "-n", "setup"],
        cwd=folder,
        env=typed,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [line for line in done.stdout.splitlines() if not line.startswith("make: ")]


def test_a_checkout_in_its_place_needs_no_setup(checkout: Path) -> None:
    """Nothing is done twice; a venv that is another's, by a link, is left as it is."""
    linked = checkout.with_name("worktree")
    shutil.copytree(checkout, linked, ignore=shutil.ignore_patterns(".venv"))
    (linked / ".venv").symlink_to(checkout / ".venv")

    assert [] == would_do(checkout)
    assert [] == would_do(linked)


def test_a_moved_checkout_makes_its_venv_anew(checkout: Path) -> None:
    """Copied or moved, the venv's scripts point elsewhere: it is cleared, and a line says so."""
    copy = shutil.copytree(checkout, checkout.with_name("copy"), symlinks=True)
    moved = checkout.rename(checkout.with_name("moved"))

    for folder in (copy, moved):
        commands = would_do(folder)

        assert 'echo "this checkout was moved or copied: its .venv is made anew"' == commands[0]
        assert "-m venv --clear .venv" in commands[2]
        assert "touch .venv/ready" == commands[-1]


def test_a_new_lock_keeps_the_venv(checkout: Path) -> None:
    """Other versions are installed into the venv that is there."""
    os.utime(checkout / ".venv/ready", (0, 0))
    commands = would_do(checkout)

    assert "-m venv .venv" in commands[1]
    assert [] == [line for line in commands if "--clear" in line or "moved" in line]
