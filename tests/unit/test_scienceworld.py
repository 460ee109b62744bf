"""ScienceWorld without its engine: tasks, settings, the gold cache, the expert and its verdicts."""

import json

import pytest

from step_ray.config import parse_config
from step_ray.envs import make_expert, task_source
from step_ray.envs.scienceworld import goldcache, tables
from step_ray.envs.scienceworld.gold import GoldPath
from step_ray.envs.scienceworld.goldcache import GOLD, fill, read_gold, with_gold
from step_ray.envs.scienceworld.tasks import list_tasks, make_task
from step_ray.errors import ConfigError, DataError, EnvError
from step_ray.tasks import build_tasks
from step_ray.types import VerdictLabel

FIRST = """Your task is to boil water. For compounds without a boiling point, burn it.

This room is called the hallway. In it, you see:
\tthe agent"""
ROOM = "This room is called the kitchen. In it, you see:\n\ta pot"
QUESTION = (
    "Ambiguous request: Please enter the number for the action you intended (or blank to cancel):\n"
    "0:\tfocus on water (in pot)\n1:\tfocus on water (in sink)"
)
STEPS = [
    ("go to kitchen", "You move to the kitchen.", "be in same location as water"),
    ("look around", "", "have pot in inventory"),
    ("pick up pot", "You move the pot to the inventory.", "have pot in inventory"),
    ("focus on water", QUESTION, "focus on substance"),
    ("focus on water (in pot)", "You focus on the water.", "focus on substance"),
    ("move pot to stove", "You move the pot to the stove.", "have object on heater (stove)"),
    ("activate stove", "The stove is now activated.", "substance is in a gaseous state"),
]
PATH = GoldPath(
    task="boil",
    variation=21,
    simplification="easy",
    engine="scienceworld 1.2.3",
    actions=tuple(action for action, _, _ in STEPS),
    observations=tuple(observation for _, observation, _ in STEPS),
    subgoals=tuple(subgoal for _, _, subgoal in STEPS),
    score=100,
    num_raw_actions=9,
    seconds=1.5,
)
TASK = with_gold(make_task("boil", 21, "test"), PATH)


def config(tmp_path, *, tasks=None, **section):
    env = {"name": "scienceworld", "scienceworld": {"gold_dir": str(tmp_path / "gold"), **section}}
    tasks = {"num_expert": 5, "num_collect": 4, "num_eval": 3, "eval_split": "test"} | (tasks or {})
    return parse_config({"name": "r", "output_dir": str(tmp_path), "env": env, "tasks": tasks})


def pairs(num, **changed):
    """The first gold steps as executed pairs; looks show the kitchen."""
    history = [(action, observation or ROOM) for action, observation, _ in STEPS[:num]]
    return history + list(changed.get("then", []))


def judge(history, action, observation):
    return make_expert(TASK).judge(FIRST, history, action, observation)


def propose(history):
    return make_expert(TASK).propose(FIRST, history)


# Tasks and settings


def test_ids_name_type_and_variation_and_splits_share_nothing():
    ids = [{t.task_id for t in list_tasks(tables.TASK_TYPES, split)} for split in tables.SPLITS]
    assert [len(x) for x in ids] == [3592, 1796, 1819]
    assert len(set.union(*ids)) == 7207
    assert "scienceworld/boil/20" in ids[1]
    assert "scienceworld/boil/21" in ids[2]


def test_the_eto_preset_has_its_211_held_out_tasks_and_limits(tmp_path):
    eto = config(tmp_path, preset="eto")
    held_out = task_source("scienceworld").held_out_tasks(eto, "test")
    assert len(held_out) == 211
    assert {t.task_type for t in held_out} == set(tables.ETO_MAX_STEPS)
    assert [t.task_id for t in held_out if t.task_type == "find-plant"][-1] == (
        "scienceworld/find-plant/234"
    )
    assert eto.env.max_steps_by_type["find-plant"] == 15
    assert eto.env.scoring == "eto"
    assert config(tmp_path, preset="eto", scoring="final").env.scoring == "final"


def test_without_preset_all_types_are_scored_by_their_end(tmp_path):
    plain = config(tmp_path)
    assert (plain.env.task_types, plain.env.max_steps_by_type) == (tables.TASK_TYPES, {})
    assert (plain.env.scoring, plain.env.max_steps) == ("final", 100)
    assert len(task_source("scienceworld").held_out_tasks(plain, "test")) == 1819


def test_the_lists_are_disjoint_and_training_can_be_thinned(tmp_path):
    thin = config(tmp_path, train_per_type=2, tasks={"num_expert": 30, "num_collect": 30})
    lists = build_tasks(thin)
    assert {int(t.params["variation"]) for t in (*lists.expert, *lists.collect)} == {0, 1}
    everything = [t.task_id for part in (lists.expert, lists.collect, lists.evaluate) for t in part]
    assert len(set(everything)) == 63


def test_tasks_that_are_evaluated_on_are_never_trained_on(tmp_path):
    same = {"train_per_type": 1, "held_out_per_type": 1, "tasks": {"eval_split": "train"}}
    lists = build_tasks(config(tmp_path, **same))
    assert lists.num_duplicates == 3


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"engine": "textworld"}, "env: engine says nothing to env.name 'scienceworld'; remove it"),
        (
            {"scienceworld": {"simplification": "cheap"}},
            "env.scienceworld: simplification: 'cheap'",
        ),
        ({"task_types": ["cook"]}, "env: task_types: 'cook' is no task type of scienceworld"),
        ({"max_steps_by_type": {"cook": 3}}, "env: max_steps_by_type: 'cook' is no task type of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(env, line):
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "r", "env": {"name": "scienceworld", **env}})
    assert str(caught.value).startswith(line)


def test_alfworld_has_no_use_for_the_section():
    with pytest.raises(
        ConfigError, match=r"^env: scienceworld says nothing to env.name 'alfworld'"
    ):
        parse_config({"name": "r", "env": {"scienceworld": {"heap_mb": 128}}})


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        build_tasks(config(tmp_path, tasks={"eval_split": "valid_unseen"}))
    assert str(caught.value) == (
        "tasks.eval_split: 'valid_unseen' is no split of scienceworld; use 'test' or 'dev'"
    )


# The cache of gold paths


def mapper_of(made):
    """A mapper that makes the given paths and notes what it was asked for."""
    asked = []

    def mapper(worker, arguments, rows):
        for row in rows:
            asked.append((row["task"], row["variation"]))
            fields = {name: getattr(PATH, name) for name in PATH.__dataclass_fields__}
            path = fields | row | made.get(row["variation"], {})
            yield {"record": json.dumps(path)}

    return mapper, asked


@pytest.fixture(autouse=True)
def _version(monkeypatch):
    monkeypatch.setattr(goldcache, "engine_version", lambda: "1.2.3")


def test_paths_are_made_once_and_read_back(tmp_path):
    mapper, asked = mapper_of({})
    keys = [("boil", 21), ("boil", 22)]
    first = fill(tmp_path, keys, "easy", 512, mapper)
    again = fill(tmp_path, keys, "easy", 512, mapper)
    assert asked == keys
    assert first == again == read_gold(tmp_path, "easy", "scienceworld 1.2.3")
    assert first["boil", 21] == PATH


def test_paths_of_other_settings_or_engines_do_not_count(tmp_path):
    mapper, _ = mapper_of({})
    fill(tmp_path, [("boil", 21)], "easy", 512, mapper)
    assert read_gold(tmp_path, "", "scienceworld 1.2.3") == {}
    assert read_gold(tmp_path, "easy", "scienceworld 1.3.0") == {}


def test_a_path_that_failed_is_made_again(tmp_path):
    broken, _ = mapper_of({21: {"error": "Java has died", "score": 0}})
    assert fill(tmp_path, [("boil", 21)], "easy", 512, broken)["boil", 21].error == "Java has died"
    mapper, asked = mapper_of({})
    assert fill(tmp_path, [("boil", 21)], "easy", 512, mapper)["boil", 21].score == 100
    assert asked == [("boil", 21)]


def test_a_task_without_a_full_path_stays_without(tmp_path):
    mapper, _ = mapper_of({22: {"score": 70}})
    source = task_source("scienceworld")
    tasks = [make_task("boil", 21, "test"), make_task("boil", 22, "test")]
    good, bad = source.equip(config(tmp_path), tasks, mapper)
    assert json.loads(good.params[GOLD])["actions"][0] == "go to kitchen"
    assert bad == tasks[1]
    with pytest.raises(DataError, match=r"^scienceworld/boil/22: no gold path reaches the full"):
        make_expert(bad)


def test_without_any_path_the_first_fault_is_told(tmp_path):
    mapper, _ = mapper_of({21: {"error": "there is no Java", "score": 0}})
    with pytest.raises(EnvError) as caught:
        task_source("scienceworld").equip(config(tmp_path), [make_task("boil", 21, "test")], mapper)
    assert str(caught.value) == "no gold path could be made; boil: there is no Java"


# The expert


def test_the_expert_walks_its_path_and_says_why():
    history = []
    for action, observation, _ in STEPS:
        thought, proposed = propose(history)
        assert proposed == action
        assert thought.endswith(f"I {action}.") or action == "look around"
        history.append((action, observation or ROOM))
    assert propose([])[0] == (
        "My task is to boil water. I want to be in same location as water. I go to kitchen."
    )
    assert propose(pairs(6))[0] == (
        "I want this: substance is in a gaseous state. I activate stove."
    )


@pytest.mark.parametrize("num", range(len(STEPS)))
def test_every_step_of_the_path_is_good(num):
    action, observation, _ = STEPS[num]
    assert judge(pairs(num), action, observation or ROOM).label is VerdictLabel.GOOD
    assert judge(pairs(num), action, None).label is VerdictLabel.GOOD


def test_other_words_of_the_same_effect_and_skipped_looks_are_good():
    teleported = [("teleport to kitchen", "You teleport to the kitchen.")]
    assert judge([], *teleported[0]).label is VerdictLabel.GOOD
    taken = ("pick up metal pot", "You move the pot to the inventory.")
    assert judge(teleported, *taken).label is VerdictLabel.GOOD
    assert propose([*teleported, taken])[1] == "focus on water"


def test_a_first_look_is_good_and_a_second_one_tells_nothing():
    look = ("look in pot", "There is nothing in the pot.")
    assert judge(pairs(3), *look).label is VerdictLabel.GOOD
    second = judge(pairs(3, then=[look]), *look)
    assert (second.label, second.error_type) == (VerdictLabel.SUBOPTIMAL, "idle")
    assert second.reflection == "That showed nothing new."


@pytest.mark.parametrize(
    ("action", "observation", "label", "error_type", "reflection", "correction"),
    [
        (
            *("fly", "No known action matches that input.", "error", "no_op"),
            *("That did nothing: it was not understood.", "pick up pot"),
        ),
        (
            *("open door", "The door is already open.", "error", "no_op"),
            *("That did nothing: The door is already open.", "pick up pot"),
        ),
        ("", "?", "error", "bad_format", "My answer had no single action in it.", "pick up pot"),
        (
            *("wait", "You decide to wait for 10 iterations.", "suboptimal", "idle"),
            *("Waiting does not help here.", "pick up pot"),
        ),
        (
            *("go to bathroom", "You move to the bathroom.", "suboptimal", "detour"),
            *("I have nothing to do in the bathroom.", "teleport to kitchen"),
        ),
        (
            *("pick up cup", "You move the cup to the inventory.", "suboptimal", "needless"),
            *("I did not need to do that.", "pick up pot"),
        ),
        (
            *("activate sink", "The sink is now activated.", "error", "off_path"),
            *("That was a mistake: The sink is now activated.", "deactivate sink"),
        ),
        (
            *("close door to hall", "The door is now closed.", "error", "off_path"),
            *("That was a mistake: The door is now closed.", "open door to hall"),
        ),
    ],
)
def test_faults_are_told_apart_and_led_back(
    action, observation, label, error_type, reflection, correction
):
    verdict = judge(pairs(2), action, observation)
    assert (verdict.label.value, verdict.error_type) == (label, error_type)
    assert verdict.reflection == reflection
    assert verdict.action == correction


def test_a_repair_is_announced_and_the_path_goes_on_after_it():
    wrong = ("activate sink", "The sink is now activated.")
    thought, action = propose(pairs(2, then=[wrong]))
    assert (thought, action) == ("First I put right what I changed. I deactivate sink.", action)
    mended = ("deactivate sink", "The sink is now deactivated.")
    assert judge(pairs(2, then=[wrong]), *mended).label is VerdictLabel.GOOD
    assert propose(pairs(2, then=[wrong, mended]))[1] == "pick up pot"


def test_what_is_put_away_is_taken_back():
    wrong = ("move pot to table", "You move the pot to the table.")
    assert judge(pairs(3), *wrong).action == "pick up pot"


def test_a_lost_focus_is_set_again():
    wrong = ("focus on cup", "You focus on the cup.")
    assert judge(pairs(6), *wrong).action == "focus on water (in pot)"
    assert judge(pairs(2), *wrong).action == "reset task"
    reset = ("reset task", "You reset the goal progress and focus.")
    assert judge(pairs(6), *reset).label is VerdictLabel.ERROR


def test_an_open_question_is_answered_with_the_words_of_the_path():
    assert propose(pairs(4))[1] == "focus on water (in pot)"
    assert judge(pairs(4), "0", "You focus on the water.").label is VerdictLabel.GOOD


def test_a_question_that_the_path_never_met_gets_its_first_offer():
    asked = ("move pot to stove", QUESTION)
    assert propose(pairs(5, then=[asked]))[1] == "focus on water (in pot)"


def test_a_gold_step_that_fails_is_worded_anew_then_passed_over_and_tried_again_at_the_end():
    refused = "No known action matches that input."
    history, proposed = pairs(2), []
    for _ in range(3):
        action = propose(history)[1]
        proposed.append(action)
        waited = action == "wait1"
        history.append((action, "You decide to wait for 1 iterations." if waited else refused))
    assert proposed == ["pick up pot", "wait1", "pick up pot"]
    assert propose(history)[1] == "focus on water"
    rest = [(action, observation) for action, observation, _ in STEPS[3:]]
    assert propose([*history, *rest])[1] == "pick up pot"


def test_without_teleporting_the_way_back_is_the_way_that_was_gone():
    history = [
        *pairs(2),
        ("go to bathroom", "You move to the bathroom."),
        ("teleport to kitchen", "No known action matches that input."),
    ]
    assert propose(history)[1] == "go to kitchen"


def test_at_the_end_of_a_path_that_did_not_suffice_looking_and_waiting_are_no_faults():
    after = pairs(len(STEPS))
    assert propose(after)[1] == "look around"
    assert judge(after, "look around", ROOM).label is VerdictLabel.GOOD
    assert propose([*after, ("look around", ROOM)])[1] == "wait1"
