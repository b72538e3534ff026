"""A SLURM of one machine: configuration, keys, ports and state of its own; nothing is left behind."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"  # where Debian has daemons


def missing() -> list[str]:
    """What of SLURM is not installed here."""
    return [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=_PATH) is None]


class Slurm:
    """Daemons that run from `with` to its end.

    Args:
        folder: where all of their files are.
        cpus: of the one node, as many as there are tasks.
    """

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder, self.cpus = folder, cpus
        self.environ = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._running) == len(DAEMONS):
            subprocess.run(
                ["scancel", "--full", "--user=root"], env=os.environ | self.environ, check=False
            )
            self.wait(lambda: not self.ask("squeue", "--noheader"), 60)
        for daemon in reversed(self._running):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str) -> str:
        """What one of SLURM's commands prints."""
        environ = os.environ | self.environ
        done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def state(self, job: int) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.ask("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, is_so, timeout: float = 600.0) -> None:
        end = time.monotonic() + timeout
        while not is_so():
            if time.monotonic() > end:
                raise TimeoutError(self.said())
            time.sleep(0.2)

    def said(self) -> str:
        logs = [path for path in sorted(self.folder.glob("*.log")) if path.is_file()]
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in logs)

    def _start(self) -> None:
        key, socket_ = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = ("pid-file=munged.pid", "log-file=munged.log", "seed-file=munge.seed")
        own = [f"--{name}={self.folder}/{path}" for name, path in (f.split("=") for f in files)]
        self._run(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_}", *own
        )
        self.wait(socket_.exists, 20)
        self._configure(socket_)
        self._run("slurmctld", "-D")
        self.wait(self._is_up, 60)
        self._run("slurmd", "-D")
        self.wait(lambda: self.ask("sinfo", "--noheader", "--format=%T") == "idle", 60)

    def _is_up(self) -> bool:
        ping = subprocess.run(
            ["scontrol", "ping"], env=os.environ | self.environ, capture_output=True
        )
        return b"is UP" in ping.stdout

    def _run(self, name: str, *flags: str) -> None:
        command = [shutil.which(name, path=_PATH) or name, *flags]
        with (self.folder / f"{name}.out.log").open("w") as log:
            self._running.append(
                subprocess.Popen(command, env=os.environ | self.environ, stdout=log, stderr=log)
            )

    def _configure(self, munge: Path) -> None:
        host = socket.gethostname().split(".")[0]
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": _free_port(),
            "SlurmdPort": _free_port(),
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={munge},cred_expire=15",  # a job waits so long in the queue again
            "CredType": "cred/munge",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd.pid",
            "SlurmctldLogFile": self.folder / "slurmctld.log",
            "SlurmdLogFile": self.folder / "slurmd.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SlurmdParameters": "config_overrides",  # a machine with one core also has two tasks
            "ReturnToService": 2,
            "KillWait": 60,
            "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs={self.cpus} State=UNKNOWN",
            "PartitionName": "test Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        }
        for folder in ("state", "spool"):
            (self.folder / folder).mkdir()
        text = "".join(f"{name}={value}\n" for name, value in settings.items())
        (self.folder / "slurm.conf").write_text(text)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        return taken.getsockname()[1]
