"""Writes procedurally generated ALFWorld games in the official on-disk layout.

Takes a `GeneratorSpec` and a folder, gives `json_2.1.1/<split>/<task>/<trial>/` folders with
`game.tw-pddl`, `traj_data.json` and `initial_state.pddl`. Needs neither alfworld nor textworld
(`official=True` reads two data files of an installed alfworld package). Never writes a game that
the native engine has not seen won by its `walkthrough`.

Splits are disjoint by construction, in two ways. Every game is drawn from a generator keyed by
(seed, split, index), and a draw is kept only if the hash of its content (`game_fingerprint`)
falls into the split's own residue class; a layout with a goal therefore belongs to exactly one
split, for every seed, size and run. Besides, `valid_unseen` has floors (rooms) of its own.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Literal

from step_ray.envs.alfworld import tables
from step_ray.envs.alfworld.engine import NativeEngine, load_game
from step_ray.envs.alfworld.pddl_text import (
    game_fingerprint,
    goal_text,
    problem_text,
    scene_fingerprint,
)
from step_ray.envs.alfworld.plan import scripted_plan
from step_ray.envs.alfworld.scene import Scene, draw_goal, draw_room, draw_scene
from step_ray.errors import ConfigError, DataError

__all__ = ["GeneratorSpec", "game_fingerprint", "generate_games"]

_SIZES = {"tiny": (4, 6, 4, 7), "small": (6, 9, 6, 12)}
"""Fewest and most receptacles, fewest and most objects; "full" is `tables.FULL_SIZES`."""

_INVENTED_FLOORS = range(10_000, 10_000_000)
_MAX_DRAWS = 10_000
"""Far above need (about every fourth draw is kept): reached only if the knobs exclude all games."""


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """Which games to generate; equal specs give byte-identical trees."""

    seed: int
    split: str
    """One of `tables.SPLITS`."""
    num_games: int
    """Games 0 .. num_games-1; game i is the same whatever `num_games` is."""
    task_types: tuple[str, ...] = tables.TASK_TYPES
    """Game i has type `task_types[i % len(task_types)]`."""
    rooms: tuple[str, ...] = tables.ROOMS
    size: Literal["tiny", "small", "full"] = "small"
    """tiny: 4-6 receptacles, 4-7 objects; small: 6-9, 6-12; full: as in the released games."""
    max_receptacles: int | None = None
    """Overrides the size's upper bound (and its lower bound where that is higher); at least 4."""
    max_objects: int | None = None
    """The same for objects lying in receptacles; at least 3."""
    official: bool = False
    """Embed domain and grammar of the installed alfworld package: the official engine loads it."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a value that no game can be made from."""
        _check_names("split", (self.split,), tables.SPLITS)
        _check_names("size", (self.size,), (*_SIZES, "full"))
        _check_names("task_types", self.task_types, tables.TASK_TYPES)
        _check_names("rooms", self.rooms, tables.ROOMS)
        for key, low in (("num_games", 0), ("max_receptacles", 4), ("max_objects", 3)):
            value = getattr(self, key)
            if value is not None and value < low:
                raise ConfigError(f"{key}: {value}: give at least {low}")
        for task_type in self.task_types:
            if not set(tables.TASK_ROOMS[task_type]) & set(self.rooms):
                raise ConfigError(
                    f"rooms: {','.join(self.rooms)}: {task_type} needs one of"
                    f" {','.join(tables.TASK_ROOMS[task_type])}"
                )

    def bounds(self, room: str) -> tuple[int, int, int, int]:
        """Fewest and most receptacles, fewest and most objects of a game in that room."""
        low_r, high_r, low_o, high_o = _SIZES.get(self.size) or tables.FULL_SIZES[room]
        high_r, high_o = self.max_receptacles or high_r, self.max_objects or high_o
        return min(low_r, high_r), high_r, min(low_o, high_o), high_o


def _check_names(key: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        raise ConfigError(f"{key}: {','.join(unknown) or 'empty'}: use one of {','.join(known)}")


@dataclass(frozen=True)
class _Drawn:
    """A kept draw and what its files are named by."""

    scene: Scene
    trial: str
    sentence: str


def _floors(room: str, split: str) -> Sequence[int]:
    """Floors 10, 20 and 30 of each room kind are unseen; the released data hold out 10 too.

    The games of `pretrain` have rooms without end: from 108 fixed rooms a small model learns the
    rooms by heart instead of reading what it is told.
    """
    if split == "pretrain":
        return _INVENTED_FLOORS
    numbers = range(1, 31)
    unseen = split == "valid_unseen"
    return [tables.FIRST_FLOOR[room] + n - 1 for n in numbers if (n % 10 == 0) == unseen]


def _draw(spec: GeneratorSpec, index: int) -> _Drawn:
    """Game `index` of the spec: redrawn until it can be solved and belongs to the split."""
    rng = Random(f"game/{spec.seed}/{spec.split}/{index}")
    task_type = spec.task_types[index % len(spec.task_types)]
    kinds = [room for room in tables.TASK_ROOMS[task_type] if room in spec.rooms]
    for _ in range(_MAX_DRAWS):
        kind = rng.choice(kinds)
        low_r, high_r, low_o, high_o = spec.bounds(kind)
        room = draw_room(kind, rng.choice(_floors(kind, spec.split)), low_r, high_r)
        goal = draw_goal(rng, room, task_type)
        if goal is None:
            continue
        scene = draw_scene(rng, room, goal, rng.randint(low_o, high_o))
        fingerprint = scene_fingerprint(scene)
        if tables.SPLITS[int(fingerprint, 16) % len(tables.SPLITS)] == spec.split:
            sentence = goal_text(goal, rng.randint(0, 1))
            return _Drawn(scene, _trial_name(index, fingerprint), sentence)
    raise DataError(f"task_types: {task_type}: no game in {_MAX_DRAWS} draws; allow a larger size")


def _trial_name(index: int, fingerprint: str) -> str:
    """In the released form (date, time, fraction); the index makes it unique within a run."""
    number = int(fingerprint[:12], 16)
    date = f"2026{number % 12 + 1:02d}{number // 12 % 28 + 1:02d}"
    return f"trial_T{date}_{index:06d}_{number // 336 % 1_000_000:06d}"


def _folder(scene: Scene) -> str:
    goal = scene.goal
    return f"{goal.task_type}-{goal.target}-None-{goal.lamp or goal.parent}-{scene.room.floor}"


def _traj_data(drawn: _Drawn) -> dict[str, object]:
    """The part of ALFRED's annotation file that collectors and the handcoded expert read."""
    scene, goal = drawn.scene, drawn.scene.goal
    return {
        "task_id": drawn.trial,
        "task_type": goal.task_type,
        "pddl_params": {
            "mrecep_target": "",
            "object_sliced": False,
            "object_target": goal.target,
            "parent_target": goal.parent,
            "toggle_target": goal.lamp,
        },
        "scene": {"floor_plan": f"FloorPlan{scene.room.floor}", "scene_num": scene.room.floor},
        "turk_annotations": {
            "anns": [{"task_desc": drawn.sentence.capitalize() + ".", "high_descs": []}]
        },
    }


def _logic(official: bool) -> tuple[str, str]:
    """Domain text and the grammar with its place holder for the goal sentence."""
    if not official:
        task = '{"task": [{"rhs": "Your task is to: UNKNOWN GOAL."}]}'
        return "", f'grammar :: """\n    {task}\n""";\n'
    spec = find_spec("alfworld")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("official: true: install the package: pip install 'step-ray[alfworld]'")
    # Importing alfworld would create a cache folder in the user's home; its data files suffice.
    data = Path(spec.submodule_search_locations[0]) / "data"
    return (data / "alfred.pddl").read_text("utf-8"), (data / "alfred.twl2").read_text("utf-8")


def _prove(path: Path, plan: list[str]) -> None:
    """Play the plan in the native engine: not won before, won by the last command."""
    engine = NativeEngine(load_game(path))
    engine.reset()
    if [engine.step(command).won for command in plan] != [False] * (len(plan) - 1) + [True]:
        raise DataError(f"walkthrough: {plan}: does not win {path.name}; this is a bug, report it")


def _write(path: Path, text: str, plan: list[str] | None = None) -> None:
    """Write atomically, after the proof if there is a plan; leave an identical file alone."""
    data = text.encode()
    if path.exists() and path.read_bytes() == data:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        if plan is not None:
            _prove(part, plan)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_game(drawn: _Drawn, split_dir: Path, logic: tuple[str, str]) -> Path:
    """Write the three files of a game, the game file last: it stands for a complete folder."""
    folder = split_dir / _folder(drawn.scene) / drawn.trial
    folder.mkdir(parents=True, exist_ok=True)
    problem = problem_text(drawn.scene, drawn.trial)
    plan = scripted_plan(drawn.scene)
    game = {
        "pddl_domain": logic[0],
        "grammar": logic[1].replace("UNKNOWN GOAL", drawn.sentence),
        "pddl_problem": problem,
        "solvable": True,
        "walkthrough": plan,
    }
    _write(folder / "traj_data.json", json.dumps(_traj_data(drawn), indent=1) + "\n")
    _write(folder / "initial_state.pddl", problem)
    path = folder / "game.tw-pddl"
    _write(path, json.dumps(game) + "\n", plan)
    return path


def generate_games(spec: GeneratorSpec, out_dir: Path | str) -> list[Path]:
    """Generate the games of a spec under `out_dir`, each proven solvable by playing it.

    Safe to call again and after a crash: files are replaced atomically, identical ones left alone.

    Args:
        spec: What to generate.
        out_dir: The folder that will hold `json_2.1.1/<split>/`.

    Returns:
        The `game.tw-pddl` files, game 0 first.

    Raises:
        ConfigError: `official` is set and alfworld is not installed.
        DataError: The knobs leave no game to draw.
    """
    logic = _logic(spec.official)
    split_dir = Path(out_dir) / "json_2.1.1" / spec.split
    return [_write_game(_draw(spec, i), split_dir, logic) for i in range(spec.num_games)]
