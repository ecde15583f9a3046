"""A real SLURM of two nodes on this one machine, in a folder; it is gone when its block ends.

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge. A tty stands in for each
node's GPU. SLURM's programs look for their configuration in /etc/slurm: Snakemake's executor takes
SLURM_CONF out of the environment of jobs. A machine that has a configuration there is left alone.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo")
CONFIGURATION = Path("/etc/slurm/slurm.conf")
OURS = "# written by the tests of listing-vectors, and removed by them"
NODES = ("n1", "n2")
TAKES_JOBS = ("idle", "mixed", "allocated", "completing")  # with a star: it does not answer
WAIT_S = 180.0

CONF = """\
{ours}
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=DEFAULT CPUs=16 RealMemory=64000 Gres=gpu:1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
GRES = "NodeName=n[1-2] Name=gpu File=/dev/tty\n"


def why_not() -> str:
    """What this machine lacks for a cluster; empty if nothing."""
    lacking = [name for name in PROGRAMS if not _program(name)]
    if lacking:
        return f"expected SLURM and munge, found no {', '.join(lacking)}; hint: make test-slurm"
    if os.geteuid() != 0:
        return "expected root, since slurmd starts jobs for users"
    if CONFIGURATION.exists() and not CONFIGURATION.read_text().startswith(OURS):
        return f"expected a machine of no cluster, found {CONFIGURATION}"
    return ""


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """Two nodes, n1 and n2. State, spool and logs of all of it are in `folder`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack

    def start_node(self, node: str) -> None:
        """Start a node and wait until it takes jobs."""
        self.start("slurmd", "-D", "-N", node)
        wait_until(lambda: self._state(node) in TAKES_JOBS)

    def _state(self, node: str) -> str:
        return said("sinfo", "-h", "-n", node, "-o", "%T").strip()

    def start(self, name: str, *words: str) -> None:
        """Start one of the programs; it ends with the cluster."""
        with open(self.folder / f"{name}.out", "a") as out:
            process = subprocess.Popen([_program(name) or name, *words], stdout=out, stderr=out)
        self._stack.callback(_end, [psutil.Process(process.pid)], process)

    def kill_node(self, node: str) -> None:
        """As a power cut would: its slurmd, its step daemons and all that they have started."""
        jobs = said("squeue", "-h", "-w", node, "-o", "%i").split()
        doomed = [p for p in psutil.process_iter() if _is_of(p, node, jobs)]
        for process in doomed:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(doomed, WAIT_S)

    def lost(self) -> set[str]:
        """The jobs that the controller has given up, since their node does not answer."""
        return set(said("squeue", "-h", "-t", "NODE_FAIL", "-o", "%i").split())

    def running(self, node: str) -> list[str]:
        """The comments of the jobs at work on a node, such as rule_encode_wildcards_1-of-8."""
        return said("squeue", "-h", "-w", node, "-t", "RUNNING", "-o", "%k").split()


def said(*words: str) -> str:
    """What a command says; nothing where it fails."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout


def wait_until(true: Callable[[], object], within_s: float = WAIT_S) -> None:
    """Wait until something holds; AssertionError if it does not in time."""
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def _is_of(process: psutil.Process, node: str, jobs: list[str]) -> bool:
    with suppress(psutil.Error):
        command = " ".join(process.cmdline())
        step = re.match(r"slurmstepd: \[(\d+)\.", command)
        return (
            command.endswith(f"slurmd -D -N {node}")
            or (step is not None and step[1] in jobs)
            or process.environ().get("SLURMD_NODENAME") == node
        )
    return False


def _end(processes: list[psutil.Process], child: "subprocess.Popen[bytes] | None" = None) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    if child is not None:
        child.wait()


@contextmanager
def cluster_of_two(folder: Path) -> Iterator[Cluster]:
    """The cluster, idle."""
    (folder / "state").mkdir(parents=True)
    CONFIGURATION.parent.mkdir(exist_ok=True)
    CONFIGURATION.write_text(
        CONF.format(
            ours=OURS, host=socket.gethostname().split(".")[0], folder=folder, ports=_free_ports(3)
        )
    )
    (CONFIGURATION.parent / "gres.conf").write_text(GRES)
    with ExitStack() as stack:
        stack.callback(CONFIGURATION.unlink)
        stack.callback((CONFIGURATION.parent / "gres.conf").unlink)
        cluster = Cluster(folder, stack)
        _start_munge(cluster)
        cluster.start("slurmctld", "-D")
        for node in NODES:
            stack.callback(cluster.kill_node, node)
            cluster.start_node(node)
        yield cluster


def _start_munge(cluster: Cluster) -> None:
    key = cluster.folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid",
             "log-file": "munge.log", "seed-file": "munge.seed"}  # fmt: skip
    words = [f"--{flag}={cluster.folder / name}" for flag, name in files.items()]
    cluster.start("munged", "--foreground", "--force", *words)
    wait_until((cluster.folder / "munge.socket").exists)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
