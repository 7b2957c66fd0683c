"""A real Slurm on this machine: one controller, two nodes, a low and a high partition, all in one folder."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])

# Neither cgroups nor accounting nor a user of its own: it runs in a container as root. `preempt_send_user_signal` has a
# job that makes room asked as it asked for (`--signal`), and GraceTime is what it has to save.
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=600
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here, if so."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a Slurm of one's own is started as root here"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Cluster:
    """Use as a context manager. `environment` is what Slurm's commands need to find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        controller, *ports = free_ports(1 + len(NODES))
        lines = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000"
            for name, port in zip(NODES, ports)
        ]
        text = CONF.format(controller=controller, folder=self.folder, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": key, "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{name}={self.folder / file}" for name, file in {**files, "seed-file": "munge.seed"}.items()]
        try:
            self.run("munged", "--force", *options)
            self.run("slurmctld", "-f", self.environment["SLURM_CONF"])
            for name in NODES:
                (self.folder / f"spool.{name}").mkdir()
                self.run("slurmd", "-N", name, "-f", self.environment["SLURM_CONF"])
            self.wait(
                lambda: self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split() == [*NODES], 30
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Jobs first: what they started is a node's to end."""
        with suppress(subprocess.CalledProcessError):
            self.run("scancel", "--full", "--signal=KILL", "-u", "root")
            self.run("scancel", "-u", "root")
            self.wait(lambda: not self.run("squeue", "-h", "-t", "R,CG"), 15)
        for name in (*NODES, "slurmctld", "munged"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                end(int(path.read_text()))

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """One of its commands; what it prints."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr + done.stdout)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        words = self.run("scontrol", "show", "job", "-o", number).split(" ")
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s:\n{self.run('squeue')}"
            time.sleep(0.2)

    def wait_until(self, number: str, state: str, seconds: float = 300) -> dict[str, str]:
        """Until the job is in a state, and no longer; a requeued one need not sit out Slurm's two minutes."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] != state:
            assert job["JobState"] not in ENDED, f"job {number} ended as {job['JobState']}\n{self.said(number)}"
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']}\n{self.said(number)}"
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                time.sleep(2)  # a node starts no job with the credential of the second in which it ended it
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
            time.sleep(0.2)
        return job

    def said(self, number: str) -> str:
        """The log of a job."""
        path = Path(self.job(number)["StdOut"])
        return path.read_text() if path.exists() else ""


ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}


def end(pid: int) -> None:
    """Asks a daemon to end, and sees to it."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        for _ in range(50):
            time.sleep(0.1)
            os.kill(pid, 0)
        os.kill(pid, signal.SIGKILL)
