"""The game generator: same bytes everywhere, disjoint splits, every game won by its walkthrough."""

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from step_ray.envs.alfworld import tables
from step_ray.envs.alfworld.engine import NativeEngine, load_game
from step_ray.envs.alfworld.generator import GeneratorSpec, game_fingerprint, generate_games
from step_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

PROBLEM = """(define (problem p) (:domain alfred) (:objects agent1 - agent) (:init
    (receptacleType Desk_bar_1 DeskType) (receptacleType Shelf_bar_1 ShelfType)
    (objectType Pen_bar_1 PenType) (objectType Mug_bar_1 MugType) (objectType Chair_bar_1 ChairType)
    (inReceptacle Pen_bar_1 Desk_bar_1) (inReceptacle Mug_bar_1 Shelf_bar_1))
    (:goal (and (exists (?o - object ?a - agent) (and (objectType ?o PenType) (holds ?a ?o))))))"""


def make(folder, **knobs):
    knobs = {"seed": 0, "split": "train", "num_games": 12, "size": "tiny"} | knobs
    return generate_games(GeneratorSpec(**knobs), folder)


def read(path):
    return json.loads(path.read_text())


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def receptacles(path):
    return list(load_game(path).facts["receptacletype"])


def lying(path):
    return list(load_game(path).facts["inreceptacle"])


def test_same_spec_gives_the_same_bytes_in_processes_with_other_hash_seeds(tmp_path):
    for hash_seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "jobs/make_games.py", "--num=18", f"--out={tmp_path / hash_seed}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
        )
    one = tree(tmp_path / "1")
    assert len(one) == 18 * 3
    assert one == tree(tmp_path / "2")


def test_a_game_does_not_depend_on_how_many_are_made(tmp_path):
    few, many = make(tmp_path / "a", num_games=3), make(tmp_path / "b", num_games=9)
    assert [p.read_bytes() for p in few] == [p.read_bytes() for p in many[:3]]


def test_another_seed_gives_other_games(tmp_path):
    names = {p.parent.name for p in make(tmp_path, seed=1)}
    assert not names & {p.parent.name for p in make(tmp_path, seed=2)}


def test_layout_on_disk_and_recorded_task_agree(tmp_path):
    for path in make(tmp_path):
        task, target, none, place, floor = path.parents[1].name.split("-")
        traj = json.loads((path.parent / "traj_data.json").read_text())
        params = traj["pddl_params"]
        assert path.parents[2] == tmp_path / "json_2.1.1" / "train"
        assert path.name == "game.tw-pddl"
        assert (traj["task_id"], traj["task_type"]) == (path.parent.name, task)
        assert (params["object_target"], none) == (target, "None")
        assert place in (params["parent_target"], params["toggle_target"])
        assert traj["scene"] == {"floor_plan": f"FloorPlan{floor}", "scene_num": int(floor)}
        assert (path.parent / "initial_state.pddl").read_text() == read(path)["pddl_problem"]


def test_calling_again_leaves_identical_files_alone_and_repairs_others(tmp_path):
    paths = make(tmp_path)
    before = tree(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in paths}
    paths[4].write_text("half a fi")
    assert make(tmp_path) == paths
    assert tree(tmp_path) == before
    assert [p for p in paths if p.stat().st_mtime_ns != times[p]] == [paths[4]]


@pytest.mark.parametrize("size", ["tiny", "small", "full"])
def test_goal_is_false_at_the_start_and_won_by_the_last_walkthrough_command(tmp_path, size):
    for path in make(tmp_path, size=size, num_games=24):
        game = load_game(path)
        engine = NativeEngine(game)
        engine.reset()
        assert engine.step("look").won is False
        assert game.solvable is True
        assert [engine.step(command).won for command in game.walkthrough] == [
            *[False] * (len(game.walkthrough) - 1),
            True,
        ]


def test_every_task_type_comes_up_equally_often_and_in_each_of_its_rooms(tmp_path):
    folders = [p.parents[1].name for p in make(tmp_path, num_games=120)]
    types = Counter(name.split("-")[0] for name in folders)
    assert types == dict.fromkeys(tables.TASK_TYPES, 20)
    kinds = ("Kitchen", "-", "LivingRoom", "Bedroom", "Bathroom")
    seen = {(n.split("-")[0], kinds[int(n.rsplit("-", 1)[1]) // 100]) for n in folders}
    assert seen == {(task, room) for task, rooms in tables.TASK_ROOMS.items() for room in rooms}


def test_task_types_and_rooms_can_be_chosen(tmp_path):
    paths = make(tmp_path, task_types=("pick_clean_then_place_in_recep",), rooms=("Bathroom",))
    assert {p.parents[1].name[:10] for p in paths} == {"pick_clean"}
    assert all(int(p.parents[1].name.rsplit("-", 1)[1]) > 400 for p in paths)


def test_splits_share_no_game_for_any_seed_or_size(tmp_path):
    fingerprints = {
        split: {
            game_fingerprint(read(p)["pddl_problem"])
            for seed in range(3)
            for p in make(tmp_path / f"{seed}", split=split, seed=seed, num_games=40)
        }
        for split in tables.SPLITS
    }
    assert all(len(found) > 100 for found in fingerprints.values())
    assert len(set.union(*fingerprints.values())) == sum(map(len, fingerprints.values()))


def test_unseen_rooms_are_in_no_other_split(tmp_path):
    floors = {
        split: {p.parents[1].name.rsplit("-", 1)[1] for p in make(tmp_path, split=split)}
        for split in tables.SPLITS
    }
    others = set.union(*(found for split, found in floors.items() if split != "valid_unseen"))
    assert not floors["valid_unseen"] & others


def test_games_on_one_floor_are_set_in_the_same_room(tmp_path):
    paths = make(tmp_path, task_types=("look_at_obj_in_light",), num_games=80)
    rooms: dict[str, set] = {}
    for path in paths:
        floor = path.parents[1].name.rsplit("-", 1)[1]
        rooms.setdefault(floor, set()).add(frozenset(receptacles(path)))
    assert 10 < len(rooms) < 80
    assert all(len(found) == 1 for found in rooms.values())


@pytest.mark.parametrize(
    ("size", "num_receptacles", "num_objects"),
    [("tiny", (4, 6), (4, 7)), ("small", (6, 9), (6, 12))],
)
def test_sizes_bound_receptacles_and_objects(tmp_path, size, num_receptacles, num_objects):
    paths = make(tmp_path, size=size, num_games=60)
    counts = {len(receptacles(p)) for p in paths}, {len(lying(p)) for p in paths}
    assert (min(counts[0]), max(counts[0])) == num_receptacles
    assert (min(counts[1]), max(counts[1])) == num_objects


def test_full_kitchens_are_as_large_as_released_ones(tmp_path):
    for path in make(tmp_path, size="full", rooms=("Kitchen",), task_types=tables.TASK_TYPES[:1]):
        assert 20 <= len(receptacles(path)) <= 54
        assert 28 <= len(lying(path)) <= 64


def test_overrides_lower_the_bounds(tmp_path):
    for path in make(tmp_path, size="full", max_receptacles=5, max_objects=4):
        assert len(receptacles(path)) <= 5
        assert len(lying(path)) <= 4


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"split": "test"},
            "split: test: use one of train,valid_seen,valid_unseen,pretrain",
        ),
        ({"size": "huge"}, "size: huge: use one of tiny,small,full"),
        ({"max_objects": 2}, "max_objects: 2: give at least 3"),
        ({"num_games": -1}, "num_games: -1: give at least 0"),
        (
            {"rooms": ("Bedroom",)},
            "rooms: Bedroom: pick_clean_then_place_in_recep needs one of Kitchen,Bathroom",
        ),
    ],
)
def test_a_spec_that_no_game_fits_is_refused(tmp_path, knobs, message):
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, **knobs)
    assert str(caught.value) == message


def test_names_and_sentences_come_out_like_the_released_ones(tmp_path):
    path = make(tmp_path, num_games=3)[2]  # the third task type: clean
    engine = NativeEngine(load_game(path))
    first = engine.reset()
    assert "You are in the middle of a room. Looking quickly around you, you see a " in first
    assert "a sinkbasin 1" in first
    target, place = path.parents[1].name.lower().split("-")[1:4:2]
    assert first.splitlines()[-1] in (
        f"Your task is to: put a clean {target} in {place}.",
        f"Your task is to: clean some {target} and put it in {place}.",
    )


def test_fingerprint_ignores_ids_and_order_but_not_layout_or_goal():
    same = PROBLEM.replace("Mug_bar_1", "Mug_bar__plus_01_dot_20").replace("\n   ", " ")
    assert game_fingerprint(same) == game_fingerprint(PROBLEM)
    moved = PROBLEM.replace("Mug_bar_1 Shelf_bar_1", "Mug_bar_1 Desk_bar_1")
    asked = PROBLEM.replace("?o PenType", "?o MugType")
    assert len({game_fingerprint(text) for text in (PROBLEM, moved, asked)}) == 3


def released_games():
    root = Path(os.environ.get("ALFWORLD_DATA", "/nonexistent")) / "json_2.1.1" / "valid_unseen"
    return sorted(root.glob("*/*/game.tw-pddl"))


@pytest.mark.skipif(not released_games(), reason="ALFWORLD_DATA holds no released games")
def test_tables_agree_with_the_facts_of_released_games():
    holds = {
        f"{place.lower()}type": {f"{obj.lower()}type" for obj in held}
        for place, held in tables.HOLDS.items()
    }
    for path in released_games():
        facts = load_game(path).facts
        present = {cls for _, cls in facts["objecttype"]}
        for place in {cls for _, cls in facts["receptacletype"]}:
            stated = {obj for where, obj in facts["cancontain"] if where == place}
            assert stated == holds[place] & present


@pytest.mark.skipif(find_spec("alfworld") is None, reason="needs pip install 'step-ray[alfworld]'")
def test_official_engine_loads_and_wins_official_games(tmp_path):
    textworld = pytest.importorskip("textworld", reason="needs textworld")
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs import PddlEnv

    env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True)), shuffle=False)
    for path in make(tmp_path, official=True, num_games=6, size="small"):
        env.load(str(path))
        assert env.reset()["won"] is False
        walkthrough = read(path)["walkthrough"]
        assert [env.step(command)[0]["won"] for command in walkthrough][-1] is True


@pytest.mark.skipif(find_spec("alfworld") is not None, reason="alfworld is installed")
def test_official_without_the_package_says_what_to_install(tmp_path):
    with pytest.raises(ConfigError, match=r"official: true: .*step-ray\[alfworld\]"):
        make(tmp_path, official=True)
