"""A Ray cluster on this machine as users start one: `ray start`, a token, `ray job submit`.

Each node is a process tree of its own, that can be killed as a machine dies. Nothing here stops a
process that it has not started.
"""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
START_S = 120
"""A busy machine takes its time."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""
STORE_BYTES = 100 * 2**20


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _processes():
    """Pid -> (parent, session) of all processes of this machine."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                found[int(stat.parent.name)] = (int(fields[1]), int(fields[3]))
    return found


def _end_with_parent():
    """A killed test leaves no cluster behind: `ray start` ends its processes at a SIGTERM."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def tree(root):
    """A process that leads a session, all that belong to it, and all their children."""
    processes, members = _processes(), {root}
    while True:
        more = {p for p, (up, session) in processes.items() if {up, session} & members} - members
        if not more:
            return members & processes.keys()
        members |= more


def blind_to(folder):
    """Words before a command that then finds an empty folder there."""
    script = f'mount -t tmpfs tmpfs "{folder}" && exec "$@"'
    return "unshare", "--mount", "sh", "-c", script, "sh"


class RayNodes:
    """A context with a head; worker nodes come and go.

    Args:
        folder: for sessions, logs and the token; its path must be short, because Ray puts sockets
            below it.
        head: flags of the head.
        more_environment: what all processes find beside this process's environment.
    """

    def __init__(self, folder, head=("--num-cpus=2",), **more_environment):
        self.folder, self._head = folder, head
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / ".ray" / "auth_token"),
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
            **more_environment,
        }
        self._nodes = {}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        if not Path(self.environment["RAY_AUTH_TOKEN_PATH"]).exists():
            # it writes below the home folder, and refuses a path where there is none yet
            home = {**self.environment, "HOME": str(self.folder)}
            home.pop("RAY_AUTH_TOKEN_PATH")
            self.ray("get-auth-token", "--generate", env=home)
        self.gcs, self.dashboard = free_port(), free_port()
        self._start(
            "head",
            "--head",
            f"--port={self.gcs}",
            f"--dashboard-port={self.dashboard}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self.folder}",
            *self._head,
        )
        return self

    def __exit__(self, *_):
        for name in list(self._nodes):
            self.kill(name)

    @property
    def address(self):
        return f"127.0.0.1:{self.gcs}"

    @property
    def url(self):
        return f"http://127.0.0.1:{self.dashboard}"

    def ray(self, *words, **options):
        """A command of Ray's own CLI; gives what it has printed."""
        options = {"env": self.environment, "timeout": START_S, **options}
        done = subprocess.run([str(BIN / "ray"), *words], capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def add(self, name, cpus=1, unseen=None, **labels):
        """Start a worker node with the label `node: <name>` and others.

        It has a folder of its own in place of the folder `unseen`, as a machine that shares none.
        """
        words = ",".join(f"{key}={value}" for key, value in {"node": name, **labels}.items())
        flags = f"--address={self.address}", f"--num-cpus={cpus}", f"--labels={words}"
        self._start(name, *flags, before=blind_to(unseen) if unseen else ())

    def _start(self, name, *flags, before=()):
        log = self.folder / f"{name}.log"
        process = subprocess.Popen(
            [
                *before,
                str(BIN / "ray"),
                "start",
                "--block",
                "--disable-usage-stats",
                "--num-gpus=0",
                f"--object-store-memory={STORE_BYTES}",
                "--min-worker-port=0",
                "--max-worker-port=0",
                "--dashboard-agent-listen-port=0",
                *flags,
            ],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=self.environment,
            cwd=self.folder,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self._nodes[name] = process
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def kill(self, name):
        """SIGKILL for all processes of a node, as when its machine dies."""
        process = self._nodes.pop(name)
        while left := tree(process.pid):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.poll()
            time.sleep(0.1)
        process.wait()

    def roots(self):
        """Name -> pid of `ray start` of the nodes that live."""
        return {name: process.pid for name, process in self._nodes.items()}

    def submit(self, submission_id, *command):
        """`ray job submit`: a process that follows the logs and ends as the job does.

        Its attribute `log` is the file of its output.
        """
        log = self.folder.with_name(f"{self.folder.name}-{submission_id}.log")
        words = ["--address", self.url, "--submission-id", submission_id, "--working-dir"]
        with log.open("a") as out:
            process = subprocess.Popen(
                [str(BIN / "ray"), "job", "submit", *words, str(ROOT), "--", *command],
                **{"env": self.environment, "stdout": out, "stderr": subprocess.STDOUT},
            )
        process.log = log
        return process

    def status(self, submission_id):
        """How Ray says that a job ended: succeeded, failed, stopped; None while it runs."""
        told = self.ray("job", "status", "--address", self.url, submission_id)
        ended = re.search(rf"Job '{submission_id}' (?:was )?(succeeded|failed|stopped)", told)
        return ended and ended[1]
