"""What encode jobs take of a machine: a GPU each, or all cores; stand-ins for the devices."""

import os
import re
import socket
from pathlib import Path

import pytest
from conftest import REPOSITORY, Run, Workspace

from pipeline.encoder import claim as claims
from pipeline.encoder.claim import claim

# Four GPUs of this name, on each of which an encode waits until there is one on all four.
FOUR_GPUS = """
import sys, time
from pathlib import Path
import pipeline.encoder.claim, pipeline.encoder.model
pipeline.encoder.model._cuda_devices = lambda: 4
pipeline.encoder.claim.gpu_names = lambda: [f"{name}-{n}" for n in range(4)]

if "pipeline.encode" in sys.orig_argv:
    import pipeline.encoder.tower as tower
    load = tower.load_encoder
    def load_encoder(model, device, precision, threads, batch_size):
        there = Path("devices")
        there.mkdir(exist_ok=True)
        (there / device).touch(exist_ok=False)
        end = time.monotonic() + 60
        while len(list(there.iterdir())) < 4 and time.monotonic() < end:
            time.sleep(0.05)
        return load(model, "cpu", "fp32", threads, batch_size)
    tower.load_encoder = load_encoder
"""


def test_as_many_encodes_as_gpus_each_on_its_own(workspace: Workspace) -> None:
    """Four shards run side by side on four GPUs, with a share of the cores each, asked or not."""
    for number in range(8):
        workspace.database.add_listing(
            number, [workspace.photo(f"{number}.jpg", size=(40, 40 + number))]
        )
    site = workspace.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"name = {workspace.folder.stat().st_ino}\n{FOUR_GPUS}")
    workspace.env["PYTHONPATH"] = f"{site}{os.pathsep}{REPOSITORY}"
    asked = workspace.run("-n", "--cores", "8", "--resources", "gpu=4", config={"shards": 4})
    run = workspace.run("--cores", "8", config={"shards": 4})

    assert [f"cuda:{n}" for n in range(4)] == sorted(
        path.name for path in (workspace.folder / "devices").iterdir()
    )
    assert {"2"} == threads_of_encode(run) == threads_of_encode(asked)
    assert 8 == len(workspace.database.vectors())


@pytest.mark.parametrize(
    ("words", "threads"),
    [
        (["--cores", "64"], "64"),
        (["--cores", "3"], "3"),
        (["--cores", "64", "--resources", "gpu=4"], "16"),
        (["--cores", "64", "--jobs", "10"], "8"),  # on a cluster that is a profile's to say
    ],
    ids=" ".join,
)
def test_on_a_processor_an_encode_uses_all_cores(
    workspace: Workspace, words: list[str], threads: str
) -> None:
    """However many there are; what --resources lets run side by side shares them."""
    workspace.database.add_listing(1, ["1.jpg"])
    run = workspace.run("-n", *words, config={"shards": 4, "device": "cpu"})

    assert {threads} == threads_of_encode(run)


def threads_of_encode(run: Run) -> set[str]:
    """What the jobs of the rule encode are given."""
    return set(re.findall(r"rule encode:\n(?:    .*\n)*?    threads: (\d+)", run.output))


def test_gpus_are_claimed_until_their_process_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first that is free; a device that was named, or the only one, is not asked about."""
    names = [f"{tmp_path.stat().st_ino}-{n}" for n in range(3)]
    monkeypatch.setattr(claims, "gpu_names", lambda: names)
    mine: list[socket.socket] = []
    monkeypatch.setattr(claims, "_claims", mine)
    taken = [claim("cuda") for _ in range(3)]
    shared = claim("cuda")
    mine.pop(1).close()

    assert ["cuda:0", "cuda:1", "cuda:2"] == taken
    assert shared in taken
    assert "cuda:1" == claim("cuda")
    assert ["cpu", "cuda:2"] == [claim("cpu"), claim("cuda:2")]
    names[1:] = []
    assert "cuda" == claim("cuda")
    for each in mine:
        each.close()
