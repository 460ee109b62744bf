"""Which parts of a run in a store a process brings to its mirror, and when.

Takes a config, or a place that a user gave, gives paths, or the config of the run that is there.
Models, games and replies of the teacher are fetched where they are used; for runs in a folder
nothing is done.
"""

from collections.abc import Sequence
from pathlib import Path

from step_ray.config import RunConfig, load_config
from step_ray.errors import ConfigError, StorageError
from step_ray.storage.objects import TRIES, check_access
from step_ray.storage.places import holds_secret, is_url, mirror, shown, url_fault, url_of
from step_ray.storage.remote import exists, free, pull

STATE = (
    *("stages", "run.json", "config.yaml", "summary.json", "tasks", "trajectories", "evaluate"),
    *("datasets", "report"),
)
TRAIN = "train"
"""What a driver and a report read, and the part that rank 0 of a training writes."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
RUN_FILE = "run.json"
MOST_LEVELS = 3
"""A part of a run is at most so deep in it: evaluate/step is two below, and the run itself none."""


def bring_state(config: RunConfig, *, is_ours: bool = False) -> None:
    """Make the mirror of a run what the store has of it.

    Where a process of this node works in the run, what it has is newer, and is left alone.

    Args:
        config: the run.
        is_ours: this process is the one that works in it.

    Raises:
        ConfigError: the store cannot be used.
    """
    root = config.run_dir
    if url_of(root) is None:
        return
    check_access(root)
    try:
        if is_ours:
            _bring(root)
            return
        with free(root) as is_free:
            if is_free:
                _bring(root)
    except StorageError as exc:
        raise ConfigError(f"output_dir: {exc}") from exc


def _bring(root: Path) -> None:
    for name in STATE:
        pull(root / name)
    with free(root / TRAIN) as is_free:  # rank 0 may be here, and the driver elsewhere
        if is_free:
            pull(root / TRAIN)


def given_path(place: str) -> Path:
    """The local path of a run, or a part of one, that a user names by path or by address.

    Of a run all is brought that can be shown without its weights; of a part, the part, and what
    says which run it is in.

    Raises:
        ConfigError: no address of a run.
        StorageError: the store cannot be read.
    """
    if not is_url(place):
        return Path(place)
    fault = url_fault(place)
    if fault or holds_secret(place):
        raise ConfigError(f"PATH: {fault or 'an address with a user or a query'}")
    path = mirror(place)
    root = next((p for p in _upwards(path) if exists(p / RUN_FILE, TRIES)), None)
    if root is None:
        raise ConfigError(f"PATH: there is no run in {place!r}; give the address of one, or a part")
    with free(root) as is_free:
        if is_free:
            _bring_part(root, path)
    return path


def given_run(path: Path, assignments: Sequence[str]) -> RunConfig:
    """The config of a run that has begun; what can be shown of it is brought here.

    Args:
        path: its folder, wherever that is now, or a config file.
        assignments: overrides `a.b=c`, later ones win.

    Raises:
        ConfigError: no run has begun there, or the config is wrong.
    """
    if path.is_dir():
        here = path.resolve()
        where = [f"output_dir={here.parent}", f"name={here.name}"]
        config = load_config(here / "config.yaml", [*where, *assignments])
    else:
        config = load_config(path, assignments)
    bring_state(config)
    if not (config.run_dir / RUN_FILE).is_file():
        raise ConfigError(
            f"name: there is no run in {shown(config.run_dir)!r}; start it with `step-ray run`"
        )
    return config


def _bring_part(root: Path, path: Path) -> None:
    if path == root:
        _bring(root)
        pull(root / "models", skip=lambda name: name.endswith(WEIGHTS))
        return
    for name in (RUN_FILE, "config.yaml", f"{TRAIN}/{path.name}/starts.jsonl"):
        pull(root / name)
    pull(path)


def _upwards(path: Path) -> list[Path]:
    return [path, *path.parents][:MOST_LEVELS]
