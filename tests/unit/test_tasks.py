"""Task lists: disjoint, stable, and no evaluation game among the training games."""

import json
import os
import shutil
from collections import Counter

import pytest

from step_ray.config import parse_config
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.envs.alfworld.tasks import check, fingerprints, games_dir, list_tasks, prepare
from step_ray.errors import ConfigError, DataError
from step_ray.tasks import build_tasks, read_tasks, write_tasks

SIMPLE = "pick_and_place_simple"


def config(folder, *, num=(4, 3, 3), seed=0, source="official", split="valid_unseen", **env):
    num_expert, num_collect, num_eval = num
    return parse_config(
        {
            "name": "r",
            "seed": seed,
            "output_dir": str(folder / "runs"),
            "env": {
                "source": source,
                "data_dir": str(folder / "data"),
                "generator": {"size": "tiny"},
                **env,
            },
            "tasks": {
                "num_expert": num_expert,
                "num_collect": num_collect,
                "num_eval": num_eval,
                "eval_split": split,
            },
        }
    )


@pytest.fixture
def folder(tmp_path):
    """A folder like ALFWORLD_DATA: 12 training games, 6 held-out ones."""
    for split, num_games in (("train", 12), ("valid_unseen", 6)):
        generate_games(
            GeneratorSpec(seed=0, split=split, num_games=num_games, size="tiny"), tmp_path / "data"
        )
    return tmp_path


def split_dir(folder, split):
    return folder / "data" / "json_2.1.1" / split


def ids(tasks):
    return [task.task_id for task in tasks]


def plant(folder, game, *, name):
    """Copy the folder of a game into the training split."""
    target = split_dir(folder, "train") / name / "trial_T1"
    shutil.copytree(game.parent, target)
    return target / "game.tw-pddl"


def held_out_game(folder, number=0):
    return sorted(split_dir(folder, "valid_unseen").glob("*/*/game.tw-pddl"))[number]


def test_several_splits_are_evaluated_with_as_many_tasks_each(folder):
    generate_games(
        GeneratorSpec(seed=0, split="valid_seen", num_games=5, size="tiny"), folder / "data"
    )
    splits = ["valid_seen", "valid_unseen"]
    lists = build_tasks(config(folder, split=splits))
    assert [task.split for task in lists.evaluate] == ["valid_seen"] * 3 + ["valid_unseen"] * 3
    assert lists.evaluate[3:] == build_tasks(config(folder)).evaluate
    whole = build_tasks(config(folder, num=(4, 3, "all"), split=splits))
    assert Counter(task.split for task in whole.evaluate) == {"valid_seen": 5, "valid_unseen": 6}


def test_games_of_all_splits_are_generated(tmp_path):
    settings = config(tmp_path, source="generated", split=["valid_seen", "valid_unseen"])
    prepare(settings)
    assert len(list_tasks(settings, "valid_seen")) == len(list_tasks(settings, "valid_unseen")) == 3
    with pytest.raises(ConfigError, match=r"tasks.num_eval: 'all' is for games that are there"):
        check(config(tmp_path, num=(4, 3, "all"), source="generated"))


@pytest.mark.parametrize("number", [0, -1, "some", True, 1.5])
def test_a_number_of_tasks_that_is_none_is_refused_in_plain_words(folder, number):
    with pytest.raises(ConfigError, match=r"^tasks\.num_eval: give a number of 1 or more, or all"):
        config(folder, num=(4, 3, number))


@pytest.mark.parametrize("splits", ["", [], ["dev", "dev"], ["dev", ""], 3, [3]])
def test_splits_that_say_nothing_or_the_same_are_refused(folder, splits):
    with pytest.raises(
        ConfigError, match=r"^tasks\.eval_split: give a split, or a list of different ones"
    ):
        config(folder, split=splits)


def test_the_lists_have_the_sizes_asked_for_and_share_nothing(folder):
    lists = build_tasks(config(folder))
    assert [len(x) for x in (lists.expert, lists.collect, lists.evaluate)] == [4, 3, 3]
    assert len({*ids(lists.expert), *ids(lists.collect), *ids(lists.evaluate)}) == 10
    assert {task.split for task in (*lists.expert, *lists.collect)} == {"train"}
    assert {task.split for task in lists.evaluate} == {"valid_unseen"}
    assert lists.num_duplicates == 0


def test_an_id_is_split_game_and_trial(folder):
    path = held_out_game(folder)
    task = list_tasks(config(folder), "valid_unseen")[0]
    game, trial = path.parts[-3:-1]
    assert task.task_id == f"alfworld/valid_unseen/{game}/{trial}"
    assert task.task_type == game.partition("-")[0]
    assert (task.env, task.params) == ("alfworld", {"game": str(path)})


def test_the_lists_do_not_depend_on_where_the_games_lie(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("movable")
    shutil.copytree(folder / "data", other / "data")
    here, there = build_tasks(config(folder)), build_tasks(config(other))
    for name in ("expert", "collect", "evaluate"):
        assert ids(getattr(here, name)) == ids(getattr(there, name))


def test_another_seed_deals_other_lists(folder):
    one, two = (build_tasks(config(folder, seed=seed)) for seed in (1, 2))
    assert ids(one.expert) != ids(two.expert)


def test_more_expert_games_keep_those_that_were_there(folder):
    few, many = build_tasks(config(folder)), build_tasks(config(folder, num=(6, 3, 3)))
    assert ids(many.expert)[:4] == ids(few.expert)


def test_a_training_game_with_the_content_of_a_held_out_one_is_left_out_and_counted(folder):
    every = config(folder, num=(6, 6, 6))
    plant(folder, held_out_game(folder, 0), name=f"{SIMPLE}-Copy-None-Shelf-1")
    plant(folder, held_out_game(folder, 1), name=f"{SIMPLE}-Copy-None-Shelf-2")
    lists = build_tasks(every)
    assert lists.num_duplicates == 2
    assert not [name for name in ids((*lists.expert, *lists.collect)) if "Copy" in name]


def test_a_copy_with_other_object_ids_is_still_a_copy(folder):
    path = plant(folder, held_out_game(folder), name=f"{SIMPLE}-Copy-None-Shelf-1")
    game = json.loads(path.read_text())
    game["pddl_problem"] = game["pddl_problem"].replace("_bar_", "_bar__plus_")
    path.write_text(json.dumps(game))
    assert build_tasks(config(folder, num=(6, 6, 6))).num_duplicates == 1


@pytest.mark.parametrize(
    ("num", "line"),
    [
        ((4, 3, 7), "tasks.num_eval: 7 asked for, 6 tasks there; lower it"),
        (
            (8, 5, 6),
            "tasks.num_expert + tasks.num_collect: 13 asked for, 12 tasks there; lower them",
        ),
    ],
)
def test_too_few_games_are_refused(folder, num, line):
    with pytest.raises(ConfigError) as caught:
        build_tasks(config(folder, num=num))
    assert str(caught.value) == line


@pytest.mark.parametrize("word", ["movable", "Sliced"])
def test_games_that_alfworld_leaves_out_are_left_out(folder, word):
    plant(folder, held_out_game(folder), name=f"{SIMPLE}-{word}-None-Shelf-1")
    assert len(list_tasks(config(folder), "train")) == 12


def test_only_the_task_types_asked_for_are_listed(folder):
    tasks = list_tasks(config(folder, task_types=[SIMPLE]), "train")
    assert (len(tasks), {task.task_type for task in tasks}) == (2, {SIMPLE})


def test_a_broken_game_is_named(folder):
    path = held_out_game(folder)
    path.write_text('{"pddl_problem": ')
    with pytest.raises(DataError) as caught:
        build_tasks(config(folder, num=(4, 3, 6)))
    assert str(caught.value) == f"game '{path}' cannot be read; remove or replace it"


def test_a_missing_split_is_named(folder):
    shutil.rmtree(split_dir(folder, "valid_unseen"))
    with pytest.raises(ConfigError, match=r"^tasks: the folder '.*' of split 'valid_unseen' is "):
        build_tasks(config(folder))


def test_a_folder_without_games_is_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        games_dir(config(tmp_path))
    assert str(caught.value) == (
        f"env.data_dir: '{tmp_path / 'data'}' holds no json_2.1.1; run alfworld-download or mend it"
    )


def test_generated_games_are_made_in_the_run_folder_once(tmp_path):
    generated = config(tmp_path, source="generated")
    prepare(generated)
    times = {p: p.stat().st_mtime_ns for p in generated.run_dir.rglob("game.tw-pddl")}
    assert len(times) == 4 + 3 + 3
    prepare(generated)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    lists = build_tasks(generated)
    assert len({*ids(lists.expert), *ids(lists.collect), *ids(lists.evaluate)}) == 10


def test_a_manifest_reads_back_what_was_written(folder, tmp_path):
    tasks = build_tasks(config(folder)).expert
    write_tasks(tmp_path / "tasks" / "expert.parquet", tasks)
    assert tuple(read_tasks(tmp_path / "tasks" / "expert.parquet")) == tasks


def test_a_game_that_cannot_be_solved_is_left_out(folder):
    path = plant(folder, held_out_game(folder), name="pick_and_place_simple-Mug-None-Shelf-1")
    path.write_text(json.dumps({**json.loads(path.read_text()), "solvable": False}))
    assert len(list_tasks(config(folder), "train")) == 12


EXTRA = "pick_clean_then_place_in_recep-Cloth-None-BathtubBasin-413/trial_T20190908_065418_661400"
"""A training game that some copies of the released data have on top of the official list."""


@pytest.mark.skipif("ALFWORLD_DATA" not in os.environ, reason="ALFWORLD_DATA is not set")
def test_the_released_splits_have_their_official_sizes(folder):
    settings = config(folder, data_dir="${ALFWORLD_DATA}")
    splits = {
        split: {task.task_id.removeprefix(f"alfworld/{split}/") for task in listed}
        for split in ("train", "valid_seen", "valid_unseen")
        for listed in [list_tasks(settings, split)]
    }
    sizes = {split: len(names - {EXTRA}) for split, names in splits.items()}
    assert sizes == {"train": 3553, "valid_seen": 140, "valid_unseen": 134}


@pytest.mark.skipif("ALFWORLD_DATA" not in os.environ, reason="ALFWORLD_DATA is not set")
@pytest.mark.parametrize(("split", "count"), [("valid_seen", 140), ("valid_unseen", 134)])
def test_no_released_evaluation_game_is_trained_on(folder, split, count):
    settings = config(folder, num=(1000, 2000, count), data_dir="${ALFWORLD_DATA}", split=split)
    lists = build_tasks(settings)
    held_out = set(fingerprints(lists.evaluate))
    assert not held_out & set(fingerprints([*lists.expert, *lists.collect]))
