"""The native ALFWorld engine on a hand-written kitchen, and side by side with the official one."""

import json
import os
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_ray.envs.alfworld import parity
from step_ray.envs.alfworld.engine import NativeEngine, load_game
from step_ray.envs.alfworld.text import join_list
from step_ray.errors import DataError

PROBLEM = (Path(__file__).parent / "data" / "tiny_kitchen.pddl").read_text()
NEVER = "(and (isSliced CounterTop_bar_1))"
TASK = "Your task is to: put a apple on sidetable."

PLACED = """(and (exists (?r - receptacle) (exists (?o - object) (and {extra}
    (inReceptacle ?o ?r) (objectType ?o AppleType) (receptacleType ?r SideTableType)))))"""
TWO_PLACED = """(and (exists (?r - receptacle) (exists (?o1 - object) (and
    (objectType ?o1 AppleType) (receptacleType ?r SideTableType) (inReceptacle ?o1 ?r)
    (exists (?o2 - object) (and (not (= ?o1 ?o2)) (objectType ?o2 AppleType)
        (receptacleType ?r SideTableType) (inReceptacle ?o2 ?r)))))))"""
IN_LIGHT = """(and
    (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and
        (objectType ?ot DeskLampType) (toggleable ?ot) (isToggled ?ot)
        (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)))
    (exists (?o - object ?a - agent) (and (objectType ?o AppleType) (holds ?a ?o))))"""
TAKE_APPLE = ["go to countertop 2", "take apple 2 from countertop 2"]
TO_TABLE = ["go to sidetable 1", "move apple 2 to sidetable 1"]


def write_game(folder, goal=NEVER, grammar=TASK, domain="", **more):
    folder = folder / "tiny" / "trial"
    folder.mkdir(parents=True, exist_ok=True)
    problem = PROBLEM.replace("GOAL)", goal + ")")
    data = {"pddl_problem": problem, "grammar": grammar, "pddl_domain": domain, **more}
    (folder / "game.tw-pddl").write_text(json.dumps(data))
    return folder / "game.tw-pddl"


def start(folder, **how):
    engine = NativeEngine(load_game(write_game(folder, **how)))
    engine.reset()
    return engine


def answers(engine, *commands):
    return [engine.step(command).text for command in commands]


def test_first_observation_lists_the_room_and_the_goal(tmp_path):
    assert NativeEngine(load_game(write_game(tmp_path))).reset() == (
        "-= Welcome to TextWorld, ALFRED! =-\n\n"
        "You are in the middle of a room. Looking quickly around you, you see a countertop 2, "
        "a countertop 1, a fridge 1, a microwave 1, a sidetable 1, and a sinkbasin 1.\n\n"
        "Your task is to: put a apple on sidetable."
    )


def test_commands_are_listed_in_alphabetical_order(tmp_path):
    engine = start(tmp_path)
    walks = ["countertop 1", "countertop 2", "fridge 1", "microwave 1", "sidetable 1"]
    everywhere = [f"go to {name}" for name in [*walks, "sinkbasin 1"]]
    assert engine.admissible() == [*everywhere, "help", "inventory", "look"]
    engine.step("go to countertop 1")
    assert engine.admissible() == [
        *("examine countertop 1", "examine countertop 2"),
        *everywhere[2:],
        *("help", "inventory", "look"),
        *("take apple 2 from countertop 2", "take knife 1 from countertop 2"),
    ]


def script(engine, text):
    """Play '> command' lines; return the same text with the engine's answers in place."""
    commands = [line[2:] for line in text.strip().splitlines() if line.startswith("> ")]
    return "\n".join(f"> {command}\n{engine.step(command).text}" for command in commands)


RECEPTACLES = """
> look
You are in the middle of a room. Looking quickly around you, you see nothing.
> go to fridge 1
You arrive at fridge 1. The fridge 1 is closed.
> take apple 1 from fridge 1
Nothing happens.
> open fridge 1
You open the fridge 1. The fridge 1 is open. In it, you see a apple 1, a bowl 1, and a spoon 1.
> take apple 1 from fridge 1
You pick up the apple 1 from the fridge 1.
> take bowl 1 from fridge 1
Nothing happens.
> inventory
You are carrying: a apple 1.
> look
You are facing the fridge 1. Next to it, you see nothing.
> move apple 1 to fridge 1
You move the apple 1 to the fridge 1.
> inventory
You are not carrying anything.
> close fridge 1
You close the fridge 1.
> examine fridge 1
The fridge 1 is closed.
> go to fridge 1
Nothing happens.
> go to sinkbasin 1
You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.
> go to microwave 1
You arrive at microwave 1. The microwave 1 is open. In it, you see nothing.
> close microwave 1
You close the microwave 1.
"""

TWO_COUNTERS = """
> go to countertop 2
You arrive at countertop 2. On the countertop 2, you see a apple 2, and a knife 1.
> look
You are facing the countertop 2, and countertop 1. Next to it, you see nothing.
> take apple 2 from countertop 2
You pick up the apple 2 from the countertop 2.
> move apple 2 to countertop 1
You move the apple 2 to the countertop 1.
> look
You are facing the countertop 2, and countertop 1. Next to it, you see a apple 2.
> examine countertop 1
On the countertop 1, you see a apple 2.
"""

OBJECT_STATES = """
> go to countertop 2
You arrive at countertop 2. On the countertop 2, you see a apple 2, and a knife 1.
> examine apple 2
Nothing happens.
> take apple 2 from countertop 2
You pick up the apple 2 from the countertop 2.
> examine apple 2
There's nothing special about apple 2.
> go to microwave 1
You arrive at microwave 1. The microwave 1 is open. In it, you see nothing.
> heat apple 2 with microwave 1
You heat the apple 2 using the microwave 1.
> examine apple 2
This is a hot apple 2.
> go to sinkbasin 1
You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.
> clean apple 2 with sinkbasin 1
You clean the apple 2 using the sinkbasin 1.
> examine apple 2
This is a hot and clean apple 2.
> go to fridge 1
You arrive at fridge 1. The fridge 1 is closed.
> cool apple 2 with fridge 1
You cool the apple 2 using the fridge 1.
> examine apple 2
This is a cool and clean apple 2.
"""

SLICED = """
> go to countertop 1
You arrive at countertop 1. On the countertop 1, you see nothing.
> take knife 1 from countertop 2
You pick up the knife 1 from the countertop 2.
> slice apple 2 with knife 1
You sliced the apple 2 with the knife 1.
> move knife 1 to countertop 1
You move the knife 1 to the countertop 1.
> take apple 2 from countertop 2
You pick up the apple 2 from the countertop 2.
> examine apple 2
This is a sliced apple 2.
> go to fridge 1
You arrive at fridge 1. The fridge 1 is closed.
> cool apple 2 with fridge 1
You cool the apple 2 using the fridge 1.
> examine apple 2
This is a cool sliced apple 2.
> go to microwave 1
You arrive at microwave 1. The microwave 1 is open. In it, you see nothing.
> heat apple 2 with microwave 1
You heat the apple 2 using the microwave 1.
> examine apple 2
This is a hot sliced apple 2.
> go to sinkbasin 1
You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.
> clean apple 2 with sinkbasin 1
You clean the apple 2 using the sinkbasin 1.
> examine apple 2
This is a hot and clean sliced apple 2.
> go to fridge 1
You arrive at fridge 1. The fridge 1 is closed.
> cool apple 2 with fridge 1
You cool the apple 2 using the fridge 1.
> examine apple 2
This is a cool and clean sliced apple 2.
"""

CLEAN_OR_COLD_ONLY = """
> go to countertop 2
You arrive at countertop 2. On the countertop 2, you see a apple 2, and a knife 1.
> take apple 2 from countertop 2
You pick up the apple 2 from the countertop 2.
> go to fridge 1
You arrive at fridge 1. The fridge 1 is closed.
> cool apple 2 with fridge 1
You cool the apple 2 using the fridge 1.
> examine apple 2
This is a cold apple 2.
"""

WASHED = """
> go to countertop 2
You arrive at countertop 2. On the countertop 2, you see a apple 2, and a knife 1.
> take apple 2 from countertop 2
You pick up the apple 2 from the countertop 2.
> go to sinkbasin 1
You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.
> clean apple 2 with sinkbasin 1
You clean the apple 2 using the sinkbasin 1.
> examine apple 2
This is a clean apple 2.
> move apple 2 to sinkbasin 1
You move the apple 2 to the sinkbasin 1.
> go to countertop 2
You arrive at countertop 2. On the countertop 2, you see a knife 1.
> take knife 1 from countertop 2
You pick up the knife 1 from the countertop 2.
> go to sinkbasin 1
You arrive at sinkbasin 1. On the sinkbasin 1, you see a apple 2.
> slice apple 2 with knife 1
You sliced the apple 2 with the knife 1.
> examine knife 1
There's nothing special about knife 1.
> go to countertop 1
You arrive at countertop 1. On the countertop 1, you see nothing.
> move knife 1 to countertop 1
You move the knife 1 to the countertop 1.
> go to sinkbasin 1
You arrive at sinkbasin 1. On the sinkbasin 1, you see a apple 2.
> take apple 2 from sinkbasin 1
You pick up the apple 2 from the sinkbasin 1.
> examine apple 2
This is a clean sliced apple 2.
"""

SWITCHES_AND_BOWL = """
> go to sidetable 1
You arrive at sidetable 1. On the sidetable 1, you see a desklamp 1, and a laptop 1.
> take laptop 1 from sidetable 1
You pick up the laptop 1 from the sidetable 1.
> examine laptop 1
There's nothing special about laptop 1.
> move laptop 1 to sidetable 1
You move the laptop 1 to the sidetable 1.
> use laptop 1
You turn on the laptop 1.
> use laptop 1
You turn on the laptop 1.
> take laptop 1 from sidetable 1
You pick up the laptop 1 from the sidetable 1.
> examine laptop 1
This laptop 1 is on.
> take desklamp 1 from sidetable 1
Nothing happens.
> use desklamp 1
You turn on the desklamp 1.
> move laptop 1 to sidetable 1
You move the laptop 1 to the sidetable 1.
> go to fridge 1
You arrive at fridge 1. The fridge 1 is closed.
> open fridge 1
You open the fridge 1. The fridge 1 is open. In it, you see a apple 1, a bowl 1, and a spoon 1.
> take bowl 1 from fridge 1
You pick up the bowl 1 from the fridge 1.
> examine bowl 1
This is a normal bowl 1. In it, you see a spoon 1.
"""

SCRIPTS = {
    "receptacles": RECEPTACLES,
    "two counters at one place": TWO_COUNTERS,
    "hot, clean, cool": OBJECT_STATES,
    "sliced": SLICED,
    "cold": CLEAN_OR_COLD_ONLY,
    "clean, then sliced": WASHED,
    "switches and a bowl": SWITCHES_AND_BOWL,
}
HEATED = ["go to microwave 1", "heat apple 2 with microwave 1"]
COOLED = ["go to fridge 1", "cool apple 2 with fridge 1"]
CLEANED = ["go to sinkbasin 1", "clean apple 2 with sinkbasin 1"]
SECOND_APPLE = ["go to fridge 1", "open fridge 1", "take apple 1 from fridge 1"]
SECOND_TO_TABLE = ["go to sidetable 1", "move apple 1 to sidetable 1"]
GOALS = [
    ("pick_and_place_simple", PLACED.format(extra=""), []),
    ("pick_clean_then_place_in_recep", PLACED.format(extra="(isClean ?o) (cleanable ?o)"), CLEANED),
    ("pick_heat_then_place_in_recep", PLACED.format(extra="(isHot ?o) (heatable ?o)"), HEATED),
    ("pick_cool_then_place_in_recep", PLACED.format(extra="(isCool ?o) (coolable ?o)"), COOLED),
]


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_scripts_are_answered_word_for_word(tmp_path, text):
    assert script(start(tmp_path), text) == text.strip()


def test_help_lists_the_commands(tmp_path):
    lines = start(tmp_path).step("help").text.split("\n")
    assert lines[0] == "Available commands:"
    assert lines[1] == "  look:                             look around your current location"
    assert lines[7] == "  move (object) to (receptacle):  place an object in or on a receptacle"
    assert lines[13:] == [
        "  slice (object) with (object):     slice an object using a sharp object",
        "",
    ]


@pytest.mark.parametrize(("task_type", "goal", "treatment"), GOALS, ids=[g[0] for g in GOALS])
def test_placing_goals_hold_only_after_the_treatment(tmp_path, task_type, goal, treatment):
    engine = start(tmp_path, goal=goal)
    assert engine.game.task_type == task_type
    untreated = [engine.step(command).won for command in TAKE_APPLE + TO_TABLE]
    assert untreated == [False, False, False, not treatment]
    engine.reset()
    treated = [engine.step(command) for command in TAKE_APPLE + treatment + TO_TABLE]
    assert [outcome.won for outcome in treated] == [False] * (len(treated) - 1) + [True]
    assert treated[-1].done


def test_two_objects_goal_needs_two_different_objects(tmp_path):
    engine = start(tmp_path, goal=TWO_PLACED)
    assert engine.game.task_type == "pick_two_obj_and_place"
    commands = TAKE_APPLE + TO_TABLE + SECOND_APPLE + SECOND_TO_TABLE
    assert [engine.step(command).won for command in commands] == [False] * 8 + [True]


def test_light_goal_needs_the_held_object_at_the_lit_lamp(tmp_path):
    engine = start(tmp_path, goal=IN_LIGHT)
    assert engine.game.task_type == "look_at_obj_in_light"
    commands = [*TAKE_APPLE, "go to sidetable 1", "use desklamp 1", "go to fridge 1"]
    assert [engine.step(command).won for command in commands] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("goal", "won"),
    [
        ("(forall (?o - object) (not (isHot ?o)))", True),
        ("(forall (?r - receptacle) (opened ?r))", False),
        ("(or (isHot Apple_bar_1) (opened Microwave_bar_1))", True),
        ("(imply (opened Microwave_bar_1) (isHot Apple_bar_1))", False),
        ("(exists (?r - receptacle) (and (openable ?r) (not (opened ?r))))", True),
        ("(= Apple_bar_1 Apple_bar_2)", False),
    ],
)
def test_other_goal_forms_are_evaluated(tmp_path, goal, won):
    assert start(tmp_path, goal=goal).step("look").won is won


OLD_GRAMMAR = """grammar :: "{
  "task": [{ "rhs": "Your task is to: put a apple on sidetable." }],
  "GotoLocation.feedback": [
     { "rhs": "You arrive at {lend.name}. #examineReceptacle.feedback#" } ],
  "PutObject.feedback": [ { "rhs": "You put the {o.name} in/on the {r.name}." } ]
}";
action PutObject {
    template :: "put {o} in/on {r}";
}
"""


def test_old_wording_is_read_from_the_grammar(tmp_path):
    engine = start(tmp_path, grammar=OLD_GRAMMAR, domain="(define (domain alfred))")
    assert "help" not in engine.admissible()
    # Places in alphabetical order are counter, fridge, oven, sink, start, table: 6 to 1.
    assert answers(engine, *TAKE_APPLE[:1], "take apple 2 from countertop 2") == [
        "You arrive at loc 6. On the countertop 2, you see a apple 2, and a knife 1.",
        "You pick up the apple 2 from the countertop 2.",
    ]
    assert answers(engine, "move apple 2 to countertop 1", "put apple 2 in/on countertop 1") == [
        "Nothing happens.",
        "You put the apple 2 in/on the countertop 1.",
    ]


def test_walkthrough_is_spelled_so_that_it_can_be_typed(tmp_path):
    plan = ["take apple_bar_1 from countertop_bar_1", "put apple 2 in/on sidetable 1"]
    assert load_game(write_game(tmp_path, walkthrough=plan)).walkthrough == (
        "take apple 2 from countertop 2",
        "move apple 2 to sidetable 1",
    )


def test_sink_without_basin_cleans_unless_the_domain_says_otherwise(tmp_path):
    narrow = """(:action CleanObject :precondition (and (cleanable ?o) (or
        ;(receptacleType ?r SinkType)
        (receptacleType ?r SinkBasinType))) :effect (and (isClean ?o)))"""
    path = write_game(tmp_path)
    data = json.loads(path.read_text())
    plain_sink = {
        "pddl_problem": data["pddl_problem"].replace(
            "SinkBasin SinkBasinType", "SinkBasin SinkType"
        )
    }
    for domain, cleans in (("", True), (narrow, False)):
        path.write_text(json.dumps({**data, **plain_sink, "pddl_domain": domain}))
        engine = NativeEngine(load_game(path))
        engine.reset()
        answers(engine, *TAKE_APPLE, "go to sinkbasin 1")
        assert ("clean apple 2 with sinkbasin 1" in engine.admissible()) is cleans


def test_engines_of_one_game_do_not_touch_each_other(tmp_path):
    game = load_game(write_game(tmp_path))
    one, other = NativeEngine(game), NativeEngine(game)
    first = one.reset()
    assert other.reset() == first
    answers(one, *TAKE_APPLE)
    assert other.step("inventory").text == "You are not carrying anything."
    assert one.reset() == first
    assert one.step("inventory").text == "You are not carrying anything."


@settings(max_examples=60, deadline=None)
@given(command=st.text(max_size=40))
def test_what_is_not_admissible_changes_nothing(tmp_path_factory, command):
    engine = start(tmp_path_factory.mktemp("game"))
    before = engine.admissible()
    if command.strip() not in before:
        assert engine.step(command).text == "Nothing happens."
        assert engine.admissible() == before


@pytest.mark.parametrize(
    ("items", "text"),
    [([], "nothing"), (["a"], "a"), (["a", "b"], "a, and b"), (["a", "b", "c"], "a, b, and c")],
)
def test_lists_are_joined_as_the_official_engine_does(items, text):
    assert join_list(items) == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(:goal", "(:gaol", "needs (:objects"),
        ("(isSliced CounterTop_bar_1))", "(isSliced CounterTop_bar_1", "not one closed"),
        (
            "(isSliced CounterTop_bar_1)",
            "(checked CounterTop_bar_1)",
            "'checked' cannot be",
        ),
        ("(atLocation agent1 loc_bar_start)", "", "0 (atLocation agent place) facts"),
        (
            "(openable Fridge_bar_1)",
            "(openable Oven_bar_1)",
            "'oven_bar_1' is used",
        ),
        ("(openable Fridge_bar_1)", "(holds agent1 Apple_bar_1)", "holds something at the start"),
        (
            "(openable Fridge_bar_1)",
            "(receptacleAtLocation Fridge_bar_1 loc_bar_sink)",
            "two locations",
        ),
    ],
)
def test_a_problem_that_cannot_be_played_is_refused_in_one_line(tmp_path, old, new, message):
    path = write_game(tmp_path)
    data = json.loads(path.read_text())
    assert old in data["pddl_problem"]
    path.write_text(json.dumps({**data, "pddl_problem": data["pddl_problem"].replace(old, new)}))
    with pytest.raises(DataError) as caught:
        load_game(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"grammar": "x"}', '{"pddl_problem": 3}'])
def test_a_file_that_is_no_game_is_refused(tmp_path, content):
    path = tmp_path / "game.tw-pddl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"game\.tw-pddl"):
        load_game(path)
    with pytest.raises(DataError, match="FileNotFoundError"):
        load_game(tmp_path / "missing")


def test_a_game_without_a_goal_sentence_is_refused(tmp_path):
    with pytest.raises(DataError, match="Your task is to"):
        load_game(write_game(tmp_path, grammar="nothing here"))


def test_a_full_grammar_with_other_texts_is_refused(tmp_path):
    grammar = f'{TASK}\n "examineObject.feedback": []'
    with pytest.raises(DataError, match="Welcome to TextWorld"):
        load_game(write_game(tmp_path, grammar=grammar))


def test_an_unknown_predicate_is_refused_by_its_name(tmp_path):
    path = write_game(tmp_path)
    path.write_text(path.read_text().replace("(receptacleType ", "(funnyType ", 1))
    with pytest.raises(DataError, match=r"game.tw-pddl: .* 'funnytype' is not of"):
        load_game(path)


def test_a_goal_with_a_movable_receptacle_is_refused(tmp_path):
    with pytest.raises(DataError, match="movable receptacle"):
        load_game(write_game(tmp_path, goal="(exists (?o ?b) (inReceptacleObject ?o ?b))"))


needs_official = pytest.mark.skipif(
    find_spec("textworld") is None or find_spec("alfworld") is None,
    reason="the official engine is not installed (extra 'alfworld')",
)
GAME_DATA = os.environ.get("ALFWORLD_DATA", "")


def official_texts():
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    grammar = Path(ALFRED_TWL2_PATH).read_text().replace("UNKNOWN GOAL", TASK.split(": ")[1][:-1])
    return {"domain": Path(ALFRED_PDDL_PATH).read_text(), "grammar": grammar}


@needs_official
@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_kitchen_scripts_match_the_official_engine(tmp_path, text):
    from step_ray.envs.alfworld.official import OfficialEngine

    path = write_game(tmp_path, goal=TWO_PLACED, **official_texts())
    report = parity.ParityReport()
    game = load_game(path)
    comparison = parity.Comparison("kitchen", NativeEngine(game), OfficialEngine(path), report)
    comparison.start()
    for line in text.strip().splitlines():
        if line.startswith("> "):
            comparison.step(line[2:])
    comparison.step("help")
    assert report.mismatches == []


@needs_official
@pytest.mark.skipif(not GAME_DATA, reason="ALFWORLD_DATA is not set")
@pytest.mark.parametrize("old_wording", [False, True])
def test_published_games_match_the_official_engine(tmp_path, old_wording):
    games = random.Random(0).sample(parity.find_games(Path(GAME_DATA)), 2)
    if old_wording:
        games = parity.write_old_wording(games, tmp_path)
    report = parity.ParityReport()
    assert len(list(parity.compare_games(games, 15, 0, report))) == 2
    assert report.mismatches == []
