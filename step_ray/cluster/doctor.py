"""What a run would lack here: packages, engines, devices, storage, keys, endpoints, the cluster.

Takes a config (None: this machine alone), gives findings, each with what to do. It starts no
cluster, joins one that the config names, and leaves nothing behind.
"""

import fcntl
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from step_ray.cluster.resources import can_grow, cluster_nodes, fault, needs_gpus
from step_ray.config import RunConfig
from step_ray.envs import REGISTRY, load_env
from step_ray.errors import StepRayError
from step_ray.storage.objects import check_access
from step_ray.storage.places import shown, url_of

GIB = 2**30
MIN_FREE_GIB = 10
"""Room for trajectories, examples and a few checkpoints of a small model."""
MIN_OPEN_FILES = 4096
"""Ray holds several files open for each worker process and each peer."""
PRIVATE_MODE = 0o077
"""Bits of a token's file that let others read it."""


class Level(Enum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    area: str
    line: str
    """What is so and, unless it is well, what to do."""

    def __str__(self) -> str:
        return f"{self.level.value:<5} {self.area:<12} {self.line}"


def ok(area: str, line: str) -> Finding:
    """All is well."""
    return Finding(level=Level.OK, area=area, line=line)


def warn(area: str, line: str) -> Finding:
    """A run may work."""
    return Finding(level=Level.WARN, area=area, line=line)


def fail(area: str, line: str) -> Finding:
    """A run will not work."""
    return Finding(level=Level.FAIL, area=area, line=line)


def examine(config: RunConfig | None = None) -> Iterator[Finding]:
    """Look at everything; findings come as they are made."""
    yield from check_packages()
    yield from check_engines(config)
    yield from check_devices(config)
    yield from check_limits()
    if config is not None and url_of(config.run_dir):
        yield from check_store(config.run_dir)
    yield from check_storage(config.run_dir if config else Path("runs"))
    if config is None:
        return
    yield from check_authentication(config)
    if config.ray.address != "local":
        yield from check_members(config)
    yield from check_inputs(config)


def check_packages(requirements: list[str] | None = None) -> Iterator[Finding]:
    """Installed versions against those that step_ray asks for.

    Args:
        requirements: as in a package's metadata; None: those of step_ray itself.
    """
    wanted = requirements if requirements is not None else metadata.requires("step-ray") or []
    num_fine = 0
    for text in wanted:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found = _version(need.name)
        if found is None:
            yield fail("packages", f"{need.name} is not installed; pip install '{text}'")
        elif not need.specifier.contains(found, prereleases=True):
            wish = f"{need.name}{need.specifier}"
            yield fail("packages", f"{need.name} is {found}; pip install '{wish}'")
        else:
            num_fine += 1
    yield ok("packages", f"{num_fine} as asked for, Ray {_version('ray')}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_engines(config: RunConfig | None) -> Iterator[Finding]:
    """Whether the environments' packages are there; only that of the config has to be."""
    for name in REGISTRY:
        is_asked = config is not None and config.env.name == name
        try:
            load_env(name)
        except StepRayError as exc:
            yield (fail if is_asked else warn)("engines", str(exc).removeprefix("env.name: "))
        else:
            yield ok("engines", name)


def check_devices(config: RunConfig | None) -> Iterator[Finding]:
    """GPUs that torch sees, against those that the machine has and the config asks for."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    is_local = config is not None and config.ray.address == "local"
    if names:
        yield ok("devices", f"{len(names)} GPU: {names[0]}, CUDA {torch.version.cuda}")
        if config and config.student.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
            yield warn("devices", "no bfloat16 in hardware; set student.dtype=float32")
    elif Path("/dev/nvidia0").exists():
        yield fail(
            "devices",
            f"there is a GPU, but torch {torch.__version__} does not see it; install a build for"
            " CUDA and a driver that is as new",
        )
    elif is_local and config is not None and needs_gpus(config):
        yield fail(
            "devices",
            "no GPU here; set train.use_gpu=false and serve.gpus_per_replica=0, or ray.address",
        )
    else:
        yield ok("devices", "no GPU, none asked for here")


def check_limits() -> Iterator[Finding]:
    """Open files and shared memory, without which Ray stumbles late."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    line = f"{files:,} open files"
    few = 0 <= files < MIN_OPEN_FILES
    yield warn("limits", f"{line}; ulimit -n 65536") if few else ok("limits", line)
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free / GIB
        line = f"{free:.1f} GiB of shared memory free"
        advice = "; Ray puts its objects on disk instead: docker run --shm-size, an emptyDir"
        yield warn("limits", line + advice) if free < 1 else ok("limits", line)


def check_store(folder: Path) -> Iterator[Finding]:
    """Whether objects can be written, read and deleted where the run will be."""
    try:
        check_access(folder)
    except StepRayError as exc:
        yield fail("storage", str(exc))
    else:
        yield ok("storage", f"{url_of(folder)} can be written, read and deleted in")


def check_storage(folder: Path) -> Iterator[Finding]:
    """Whether files can be made, locked and renamed where the run will be, and how many."""
    place = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as made:
            first = Path(made) / "a"
            with first.open("wb") as file:
                file.write(b"x")
                os.fsync(file.fileno())
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            first.replace(first.with_name("b"))
    except OSError as exc:
        yield fail(
            "storage",
            f"{place}: files cannot be made, locked and renamed ({exc.strerror}); give another"
            " output_dir, on a file system that can",
        )
        return
    free = shutil.disk_usage(place).free / GIB
    line = f"{place} can be written, locked and renamed in, {free:,.0f} GiB free"
    if free < MIN_FREE_GIB:
        yield warn("storage", f"{line}; make room or give another output_dir")
    else:
        yield ok("storage", line)


def check_authentication(config: RunConfig) -> Iterator[Finding]:
    """The token for a cluster; a private one has no port that needs it."""
    if config.ray.address == "local":
        yield ok("token", "a private cluster needs none")
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    given = bool(os.environ.get("RAY_AUTH_TOKEN"))
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode != "token":
        said = f"RAY_AUTH_MODE is {mode!r}" if mode else "RAY_AUTH_MODE is not set"
        yield warn(
            "token", f"{said}: the cluster is open to all who reach it; export RAY_AUTH_MODE=token"
        )
    elif not given and not path.is_file():
        yield fail("token", f"none in RAY_AUTH_TOKEN or {path}; {_token_advice(path)}")
    elif not given and path.stat().st_mode & PRIVATE_MODE:
        yield warn("token", f"others can read {path}; chmod 600 {path}")
    else:
        yield ok("token", f"in {'RAY_AUTH_TOKEN' if given else path}")


def _token_advice(path: Path) -> str:
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):  # which Ray's own command then wants to read
        return f"put the token of the cluster into {path}"
    return "ray get-auth-token --generate, or the token of the cluster"


@contextmanager
def left_as_it_was(folder: Path) -> Iterator[None]:
    """Take a folder away again that was made for a check only."""
    is_new = not folder.exists()
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # somebody has put something there
                folder.rmdir()


def check_members(config: RunConfig) -> Iterator[Finding]:
    """Join the cluster, ask its nodes, and see whether the run fits."""
    from step_ray.cluster.nodes import check_folder, check_nodes
    from step_ray.cluster.raysetup import connected
    from step_ray.stages.line import build_stages

    try:
        check_folder(config.run_dir)
        with connected(config.ray):
            nodes = cluster_nodes()
            yield ok("cluster", f"{len(nodes)} node(s) at {config.ray.address!r}")
            with left_as_it_was(config.run_dir):
                reports = check_nodes(config.run_dir)
            silent = len(nodes) - len(reports)
            told = f"{len(reports)} node(s) have the same versions and see {shown(config.run_dir)}"
            yield (
                warn("cluster", f"{told}, {silent} did not answer")
                if silent
                else ok("cluster", told)
            )
            line = fault(config, [stage.name for stage in build_stages(config)], nodes)
            if line:
                yield (warn if can_grow() else fail)("cluster", line)
            else:
                yield ok("cluster", "the run fits")
    except StepRayError as exc:
        yield fail("cluster", str(exc))


def check_inputs(config: RunConfig) -> Iterator[Finding]:
    """What a run looks at before it begins: tasks, prompts, endpoints, model, local resources."""
    from step_ray.pipeline import preflight
    from step_ray.stages.line import build_stages

    stages = [stage.name for stage in build_stages(config)]
    for check in preflight(config, stages, ask=True):
        yield fail("inputs", check.fault) if check.fault else ok("inputs", check.what)


def report(config: RunConfig | None, tell: Callable[[str], object]) -> bool:
    """Tell all findings; gives whether a run would work."""
    findings = []
    for finding in examine(config):
        findings.append(finding)
        tell(str(finding))
    counts = {level: sum(f.level is level for f in findings) for level in Level}
    tell(f"{counts[Level.FAIL]} to mend, {counts[Level.WARN]} to know, {counts[Level.OK]} fine")
    return not counts[Level.FAIL]
