"""The ALFWorld player: what it believes, how it plays, and what it calls a fault."""

import random

import pytest

from step_ray.envs.alfworld import tables
from step_ray.envs.alfworld.belief import Belief, Goal, class_of, listed, parse_goal
from step_ray.envs.alfworld.env import AlfworldEnv
from step_ray.envs.alfworld.explorer import random_action, remark
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.envs.alfworld.judge import judge, propose, replay
from step_ray.types import Task, Verdict, VerdictLabel

NOTHING = "Nothing happens."
GOOD = Verdict(label=VerdictLabel.GOOD)


LARGE_ROOM = (*(f"drawer {n}" for n in range(1, 9)), "fridge 1", "shelf 1", "diningtable 1")


def room(task, receptacles=("drawer 1", "fridge 1", "shelf 1", "shelf 2", "sinkbasin 1")):
    names = ", and ".join([", ".join(f"a {r}" for r in receptacles[:-1]), f"a {receptacles[-1]}"])
    around = f"You are in the middle of a room. Looking quickly around you, you see {names}."
    return f"{around}\n\nYour task is to: {task}."


PUT_MUG = room("put a mug in shelf")
CLEAN_MUG = room("clean some mug and put it in shelf")
LOOK = room("look at mug under the desklamp")
TWO_MUGS = room("put two mug in shelf")

TO_DRAWER = ("go to drawer 1", "You arrive at drawer 1. The drawer 1 is closed.")
OPENED = "You open the drawer 1. The drawer 1 is open. In it, you see"
OPEN_DRAWER = ("open drawer 1", f"{OPENED} a mug 1, and a pen 1.")
EMPTY_DRAWER = ("open drawer 1", f"{OPENED} nothing.")
CLOSE = ("close drawer 1", "You close the drawer 1.")
TAKE_MUG = ("take mug 1 from drawer 1", "You pick up the mug 1 from the drawer 1.")
TO_SINK = ("go to sinkbasin 1", "You arrive at sinkbasin 1. On the sinkbasin 1, you see a mug 2.")
CLEAN = ("clean mug 1 with sinkbasin 1", "You clean the mug 1 using the sinkbasin 1.")
TO_SHELF = ("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see nothing.")
TO_SHELF_2 = ("go to shelf 2", "You arrive at shelf 2. On the shelf 2, you see a desklamp 1.")
PUT = ("move mug 1 to shelf 1", "You move the mug 1 to the shelf 1.")
FIND = [TO_DRAWER, OPEN_DRAWER]
HOLD = [*FIND, TAKE_MUG]


# Reading


@pytest.mark.parametrize(
    ("sentence", "goal"),
    [
        ("put a mug in shelf", Goal(target="mug", destination="shelf")),
        ("put some mug on shelf", Goal(target="mug", destination="shelf")),
        ("look at mug under the desklamp", Goal(target="mug", lamp="desklamp")),
        ("examine the mug with the desklamp", Goal(target="mug", lamp="desklamp")),
        ("put a clean mug in shelf", Goal(target="mug", treatment="clean", destination="shelf")),
        (
            "clean some mug and put it in shelf",
            Goal(target="mug", treatment="clean", destination="shelf"),
        ),
        ("put a hot mug in shelf", Goal(target="mug", treatment="heat", destination="shelf")),
        (
            "heat some mug and put it in shelf",
            Goal(target="mug", treatment="heat", destination="shelf"),
        ),
        ("put a cool mug in shelf", Goal(target="mug", treatment="cool", destination="shelf")),
        (
            "cool some mug and put it in shelf",
            Goal(target="mug", treatment="cool", destination="shelf"),
        ),
        ("put two mug in shelf", Goal(target="mug", count=2, destination="shelf")),
        ("find two mug and put them in shelf", Goal(target="mug", count=2, destination="shelf")),
    ],
)
def test_the_twelve_goal_sentences_are_read(sentence, goal):
    assert parse_goal(sentence) == goal
    assert parse_goal(f" {sentence.capitalize()}. ") == goal


def test_every_sentence_of_the_generator_is_one_of_the_twelve():
    for task_type, forms in tables.GOAL_TEXTS.items():
        goals = [parse_goal(f.format(obj="mug", recep="shelf", lamp="desklamp")) for f in forms]
        assert goals[0] == goals[1], task_type


@pytest.mark.parametrize("sentence", ["", "wash the dishes", "put a mug", "put three mug in shelf"])
def test_another_sentence_is_refused(sentence):
    with pytest.raises(ValueError, match="not a goal of ALFWorld"):
        parse_goal(sentence)


def test_lists_of_things_are_read():
    assert listed("nothing") == []
    assert listed("a mug 1") == ["mug 1"]
    assert listed("a mug 1, and a pen 2") == ["mug 1", "pen 2"]
    assert listed("a mug 1, a apple 3, and a butter knife 2") == [
        "mug 1",
        "apple 3",
        "butter knife 2",
    ]


def test_the_room_and_the_goal_are_read_from_the_first_observation():
    belief = Belief.from_observation(PUT_MUG)
    assert belief.receptacles == ["drawer 1", "fridge 1", "shelf 1", "shelf 2", "sinkbasin 1"]
    assert belief.goal == Goal(target="mug", destination="shelf")
    assert (belief.location, belief.holding, belief.contents) == (None, None, {})
    assert belief.unseen() == belief.receptacles


@pytest.mark.parametrize("text", ["", "You see nothing.", "Your task is to: put a mug in shelf."])
def test_a_text_without_room_or_task_is_refused(text):
    with pytest.raises(ValueError, match="no room or no task"):
        Belief.from_observation(text)


def test_a_closed_receptacle_is_known_as_closed_until_it_is_opened():
    belief = replay(PUT_MUG, [TO_DRAWER])
    assert (belief.location, belief.closed, belief.contents) == ("drawer 1", {"drawer 1"}, {})
    belief.read(*OPEN_DRAWER)
    assert (belief.closed, belief.contents) == (set(), {"drawer 1": ["mug 1", "pen 1"]})
    belief.read(*CLOSE)
    assert (belief.closed, belief.openable) == ({"drawer 1"}, {"drawer 1"})
    assert belief.contents == {"drawer 1": ["mug 1", "pen 1"]}


def test_what_is_taken_is_in_the_hand_and_what_is_put_lies_there():
    belief = replay(PUT_MUG, HOLD)
    assert (belief.holding, belief.contents["drawer 1"]) == ("mug 1", ["pen 1"])
    belief.read(*TO_SHELF)
    belief.read(*PUT)
    assert (belief.holding, belief.contents["shelf 1"]) == (None, ["mug 1"])
    assert belief.where_is("mug") == ("mug 1", "shelf 1")


def test_the_goals_treatment_is_remembered():
    assert replay(CLEAN_MUG, [*HOLD, TO_SINK, CLEAN]).treated == {"mug 1"}
    assert replay(PUT_MUG, [*HOLD, TO_SINK, CLEAN]).treated == set()


@pytest.mark.parametrize(("after", "treated"), [("cool", set()), ("clean", {"mug 1"})])
def test_cooling_undoes_heating_and_cleaning_does_not(after, treated):
    belief = replay(room("put a hot mug in shelf"), HOLD)
    belief.read("heat mug 1 with microwave 1", "You heat the mug 1 using the microwave 1.")
    belief.read(f"{after} mug 1 with x 1", f"You {after} the mug 1 using the x 1.")
    assert belief.treated == treated


def test_an_action_without_effect_changes_nothing():
    belief = replay(PUT_MUG, FIND)
    before = repr(belief)
    for action in ("take mug 1 from drawer 1", "go to nowhere 1", "dance", "go to drawer 1", ""):
        belief.read(action, NOTHING)
    assert repr(belief) == before


def test_a_receptacle_that_cannot_be_gone_to_is_looked_at_from_here():
    history = [TO_DRAWER, EMPTY_DRAWER, ("go to fridge 1", NOTHING)]
    assert propose(PUT_MUG, history)[1] == "examine fridge 1"
    seen = ("examine fridge 1", "The fridge 1 is open. In it, you see a mug 3.")
    assert propose(PUT_MUG, [*history, seen])[1] == "take mug 3 from fridge 1"
    assert propose(PUT_MUG, [*history, ("examine fridge 1", NOTHING)])[1] == "go to shelf 1"


# Playing


@pytest.mark.parametrize(
    ("task", "history", "action"),
    [
        (PUT_MUG, [], "go to drawer 1"),
        (PUT_MUG, [TO_DRAWER], "open drawer 1"),
        (PUT_MUG, [TO_DRAWER, EMPTY_DRAWER], "go to fridge 1"),
        (PUT_MUG, FIND, "take mug 1 from drawer 1"),
        (PUT_MUG, HOLD, "go to shelf 1"),
        (PUT_MUG, [*HOLD, TO_SHELF], "move mug 1 to shelf 1"),
        (CLEAN_MUG, HOLD, "go to sinkbasin 1"),
        (CLEAN_MUG, [*HOLD, TO_SINK], "clean mug 1 with sinkbasin 1"),
        (CLEAN_MUG, [*HOLD, TO_SINK, CLEAN], "go to shelf 1"),
        (LOOK, HOLD, "go to fridge 1"),
        (LOOK, [*HOLD, TO_SHELF_2], "use desklamp 1"),
        (LOOK, [*HOLD, TO_SHELF_2, TO_SHELF], "go to shelf 2"),
        (TWO_MUGS, [*HOLD, TO_SHELF, PUT], "go to fridge 1"),
        (TWO_MUGS, [*HOLD, TO_SINK, TO_SHELF, PUT], "go to sinkbasin 1"),
    ],
)
def test_the_expert_goes_on_from_what_it_has_read(task, history, action):
    assert propose(task, history)[1] == action


def test_a_wrong_object_is_brought_back_to_where_it_came_from():
    pen = ("take pen 1 from drawer 1", "You pick up the pen 1 from the drawer 1.")
    assert propose(PUT_MUG, [*FIND, pen])[1] == "move pen 1 to drawer 1"
    assert propose(PUT_MUG, [*FIND, pen, TO_SHELF])[1] == "go to drawer 1"


def test_a_wrong_object_that_a_place_refuses_goes_elsewhere():
    history = [
        *FIND,
        ("take pen 1 from drawer 1", "You pick up the pen 1 from the drawer 1."),
        ("move pen 1 to drawer 1", NOTHING),
    ]
    assert propose(PUT_MUG, history)[1] == "go to fridge 1"


def test_where_nothing_is_left_to_try_the_expert_looks_around():
    seen = [
        (f"go to {r}", f"You arrive at {r}. On the {r}, you see nothing.")
        for r in ("drawer 1", "fridge 1", "shelf 1", "shelf 2", "sinkbasin 1")
    ]
    assert propose(PUT_MUG, seen)[1] == "look"


def make_games(folder, num_games, **knobs):
    spec = GeneratorSpec(**{"seed": 11, "split": "train", "num_games": num_games} | knobs)
    return [
        Task(task_id=str(path), env="alfworld", split="t", goal="", params={"game": str(path)})
        for path in generate_games(spec, folder)
    ]


def play(task, num_random=0):
    """Random commands, then the expert; gives whether it won, and the verdicts on the expert."""
    env = AlfworldEnv()
    first, history, verdicts = env.reset(task), [], []
    rng = random.Random(task.task_id.rpartition("/json_2.1.1/")[2])
    while len(history) < num_random + 60:
        is_random = len(history) < num_random
        belief = replay(first, history)
        action = random_action(belief, rng) if is_random else propose(first, history)[1]
        answer = env.step(action)
        if not is_random:
            verdicts.append(judge(first, history, action, answer.observation))
        history.append((action, answer.observation))
        if answer.done:
            return True, verdicts
    return False, verdicts


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    """Ten games of each task type."""
    return make_games(tmp_path_factory.mktemp("games"), 60, size="small")


def test_the_expert_wins_and_finds_no_fault_with_itself(games):
    types = {task.params["game"].rpartition("/train/")[2].partition("-")[0] for task in games}
    assert types == set(tables.TASK_TYPES)
    for task in games:
        won, verdicts = play(task)
        assert won, task.task_id
        assert set(verdicts) == {GOOD}, task.task_id


def test_the_expert_wins_from_wherever_random_play_has_led(tmp_path):
    games = make_games(tmp_path, 120, size="tiny")
    outcomes = {task.task_id: play(task, num_random=6)[0] for task in games}
    assert [name for name, won in outcomes.items() if not won] == []


def test_the_expert_wins_a_large_room(tmp_path):
    assert [play(task)[0] for task in make_games(tmp_path, 6, size="full")] == [True] * 6


# Judging


def verdict(task, history, action, observation):
    return judge(task, history, action, observation)


def fault(*case):
    got = verdict(*case)
    return got.label.value, got.error_type, got.reflection


@pytest.mark.parametrize(
    ("history", "action", "why"),
    [
        ([], "take mug 1 from drawer 1", "I am not at drawer 1"),
        ([], "go to shelf 9", "there is no shelf 9"),
        ([], "open shelf 9", "there is no shelf 9"),
        ([TO_SHELF], "open drawer 1", "I am not at drawer 1"),
        ([TO_SHELF], "dance", "that is not possible here"),
        ([TO_SHELF], "go to shelf 1", "I am already at shelf 1"),
        ([TO_DRAWER], "take mug 1 from drawer 1", "drawer 1 is closed"),
        (FIND, "take mug 7 from drawer 1", "mug 7 is not at drawer 1"),
        (HOLD, "take pen 1 from drawer 1", "I already hold mug 1"),
        (HOLD, "move mug 1 to shelf 1", "I am not at shelf 1"),
        ([TO_SHELF], "move mug 1 to shelf 1", "I do not hold mug 1"),
        (
            [*HOLD, CLOSE],
            "move mug 1 to drawer 1",
            "drawer 1 is closed",
        ),
        ([*HOLD, TO_SHELF], "clean mug 1 with shelf 1", "shelf 1 is not for that"),
    ],
)
def test_a_step_without_effect_is_an_error_with_its_likely_reason(history, action, why):
    assert fault(PUT_MUG, history, action, NOTHING) == (
        "error",
        "no_op",
        f"That did nothing: {why}.",
    )


PEN = ("take pen 1 from drawer 1", "You pick up the pen 1 from the drawer 1.")
TO_FRIDGE = ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed.")
PUT_2 = ("move mug 1 to shelf 2", "You move the mug 1 to the shelf 2.")
BACK = ("take mug 1 from shelf 1", "You pick up the mug 1 from the shelf 1.")
USE = ("use desklamp 1", "You turn on the desklamp 1.")
PUT_DRAWER = ("move mug 1 to drawer 1", "You move the mug 1 to the drawer 1.")

FAULTS = [
    (
        *(PUT_MUG, [], ("", "Say it again.")),
        *("error", "bad_format", "My answer had no single action in it.", "go to drawer 1"),
    ),
    (
        *(PUT_MUG, FIND, PEN),
        *("error", "wrong_object", "I took pen 1, but I need a mug.", "move pen 1 to drawer 1"),
    ),
    (
        *(PUT_MUG, [*HOLD, TO_SINK], CLEAN),
        *("error", "wrong_tool", "I do not need to clean mug 1.", "go to shelf 1"),
    ),
    (
        *(PUT_MUG, HOLD, PUT_DRAWER),
        "error",
        "wrong_place",
        "mug 1 does not go to drawer 1, but to a shelf.",
        "take mug 1 from drawer 1",
    ),
    (
        *(TWO_MUGS, [*HOLD, TO_SHELF_2], PUT_2),
        *("error", "wrong_place", "Both go to shelf 1, not shelf 2.", "take mug 1 from shelf 2"),
    ),
    (
        *(LOOK, [*HOLD, TO_SHELF_2], PUT_2),
        "error",
        "wrong_place",
        "I need to hold mug 1 under the desklamp.",
        "take mug 1 from shelf 2",
    ),
    (
        *(CLEAN_MUG, [*HOLD, TO_SHELF], PUT),
        *("error", "untreated", "I put mug 1 down before I clean it.", "take mug 1 from shelf 1"),
    ),
    (
        *(TWO_MUGS, [*HOLD, TO_SHELF, PUT], BACK),
        *("error", "undone", "mug 1 was already where it belongs.", "move mug 1 to shelf 1"),
    ),
    (
        *(PUT_MUG, [TO_DRAWER, EMPTY_DRAWER, TO_SHELF], TO_DRAWER),
        *("suboptimal", "revisit", "I have already seen drawer 1.", "go to fridge 1"),
    ),
    (
        *(PUT_MUG, [*HOLD, CLOSE], ("open drawer 1", f"{OPENED} a pen 1.")),
        *("suboptimal", "revisit", "I have already seen drawer 1.", "go to shelf 1"),
    ),
    (
        *(PUT_MUG, [TO_DRAWER], TO_SHELF),
        *("suboptimal", "skipped", "I left drawer 1 without opening it.", "go to drawer 1"),
    ),
    (
        *(PUT_MUG, FIND, TO_FRIDGE),
        "suboptimal",
        "detour",
        "I know where a mug is, it is not at fridge 1.",
        "go to drawer 1",
    ),
    (
        *(CLEAN_MUG, HOLD, TO_SHELF),
        "suboptimal",
        "detour",
        "I hold mug 1, I have nothing to do at shelf 1.",
        "go to sinkbasin 1",
    ),
    (
        *(CLEAN_MUG, [*HOLD, TO_SINK, CLEAN], CLEAN),
        *("suboptimal", "repeated", "mug 1 is already clean.", "go to shelf 1"),
    ),
    (
        *(LOOK, [TO_SHELF_2], USE),
        *("suboptimal", "too_early", "I need to hold a mug first.", "go to drawer 1"),
    ),
    (
        *(PUT_MUG, [TO_SHELF_2], USE),
        *("suboptimal", "idle", "I do not need that for the task.", "go to drawer 1"),
    ),
    (
        *(PUT_MUG, [], ("look", "You are in the middle of a room.")),
        *("suboptimal", "idle", "That did not help: look shows nothing new.", "go to drawer 1"),
    ),
]


@pytest.mark.parametrize(
    ("task", "history", "step", "label", "error_type", "reflection", "correction"),
    FAULTS,
    ids=[f"{case[4]}: {case[2][0] or 'nothing'}" for case in FAULTS],
)
def test_a_fault_is_named_and_corrected_from_the_state_it_has_left(
    task, history, step, label, error_type, reflection, correction
):
    got = verdict(task, history, *step)
    assert fault(task, history, *step) == (label, error_type, reflection)
    assert (got.action, bool(got.thought)) == (correction, True)


@pytest.mark.parametrize(
    ("task", "history", "step"),
    [
        (PUT_MUG, [], TO_DRAWER),
        (PUT_MUG, [], TO_SHELF_2),  # another order of searching
        (PUT_MUG, HOLD, TO_SHELF_2),  # another shelf will do
        (PUT_MUG, [*HOLD, TO_SHELF_2], PUT_2),
        (PUT_MUG, FIND, TAKE_MUG),
        (PUT_MUG, [*FIND, PEN], ("move pen 1 to drawer 1", "You move the pen 1 to the drawer 1.")),
        (CLEAN_MUG, [*HOLD, TO_SINK], CLEAN),
        (LOOK, HOLD, TO_FRIDGE),
        (LOOK, [*HOLD, TO_SHELF_2], USE),
    ],
)
def test_a_step_that_helps_is_good(task, history, step):
    assert verdict(task, history, *step) == GOOD


def test_an_unexecuted_step_is_judged_and_corrected_where_the_agent_stands():
    got = verdict(PUT_MUG, FIND, "take pen 1 from drawer 1", None)
    assert (got.error_type, got.action) == ("wrong_object", "take mug 1 from drawer 1")
    assert verdict(PUT_MUG, FIND, "take mug 1 from drawer 1", None) == GOOD


def test_the_judge_leaves_the_history_alone():
    history = list(HOLD)
    verdict(PUT_MUG, history, *PUT_DRAWER)
    assert history == HOLD


def test_classes_of_names():
    assert (class_of("mug 2"), class_of("butter knife 11")) == ("mug", "butter knife")


# Where it looks first


def test_looks_first_where_such_things_usually_lie_in_a_large_room():
    text = room("put a apple in shelf", LARGE_ROOM)
    assert propose(text, [])[1] == "go to diningtable 1"
    table = ("go to diningtable 1", "On the diningtable 1, you see nothing.")
    assert propose(text, [table])[1] == "go to fridge 1"


def test_looks_in_the_order_of_the_list_in_a_small_room():
    assert propose(room("put a apple in shelf", LARGE_ROOM[-3:]), [])[1] == "go to fridge 1"


# What the random player says


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ([], ""),
        ([TO_SHELF], "I hold nothing."),
        (HOLD, "I hold mug 1."),
        (
            [TO_SHELF, ("take mug 1 from shelf 1", NOTHING)],
            "That did nothing: mug 1 is not at shelf 1. I hold nothing.",
        ),
        ([*HOLD, ("go to desk 4", NOTHING)], "That did nothing: there is no desk 4. I hold mug 1."),
    ],
)
def test_random_play_is_remarked_on_without_saying_what_would_be_better(history, said):
    assert remark(PUT_MUG, history) == said
