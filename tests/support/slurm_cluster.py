"""A cluster of Slurm's own daemons on this machine, for tests: one node of a few CPUs, and munge.

    with slurm_cluster(tmp_path) as variables:
        subprocess.run(["srun", "-n", "2", "hostname"], env=variables)

Debian's packages slurm-wlm and munge have all that it needs.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from server_process import ServerMissing, answers, find_program, free_ports, started

DEBIAN = "Debian's packages slurm-wlm and munge have it"
_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=10
JobRequeue=1
NodeName=one NodeAddr=127.0.0.1 CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=one Default=YES MaxTime=10 State=UP OverSubscribe=YES
"""


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Runs the daemons; yields the environment for Slurm's commands. Raises `ServerMissing`."""
    munged, slurmctld, slurmd = (find_program(name, DEBIAN) for name in ("munged", "slurmctld", "slurmd"))
    for name in ("srun", "sbatch", "scontrol", "sinfo"):
        find_program(name, DEBIAN)
    socket_path = folder / "munge.socket"
    if len(str(socket_path)) > 100:
        raise ServerMissing(f"{socket_path} is too long for a socket's name")
    for name in ("spool", "state"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    ports = free_ports(2)
    conf = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    conf.write_text(_CONF.format(host=host, user=getpass.getuser(), folder=folder, ports=ports))
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    variables["SLURM_CONF"] = str(conf)
    files = {
        "socket": socket_path,
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "munge.seed",
    }
    munge = [munged, "-F", "--force", f"--key-file={key}"]
    munge += [f"--{option}={folder / name}" for option, name in files.items()]

    def idle(_: object) -> bool:
        asked = subprocess.run(
            ["sinfo", "--noheader", "--format", "%t"],
            env=variables,
            capture_output=True,
            text=True,
            timeout=30,
        )
        return asked.stdout.split() == ["idle"]

    with (
        started(lambda _: munge, ports=0, log=folder / "munged.out", ready=lambda _: socket_path.exists()),
        started(
            lambda _: [slurmctld, "-D"],
            ports=0,
            log=folder / "slurmctld.out",
            ready=lambda _: answers(ports[0]),
            env=variables,
        ),
        started(
            lambda _: [slurmd, "-D", "-N", "one"],
            ports=0,
            log=folder / "slurmd.out",
            ready=idle,
            env=variables,
        ),
    ):
        yield variables
