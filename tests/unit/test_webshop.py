"""WebShop as an environment: tasks, settings, the expert and its verdicts, on a generated shop."""

import json
import os
import re
from pathlib import Path

import pytest

from step_ray.collection.judging import is_listed
from step_ray.config import load_config, parse_config
from step_ray.envs import make_env, make_expert, task_source
from step_ray.envs.webshop import replay
from step_ray.envs.webshop.catalogue import build_catalogue, open_catalogue
from step_ray.envs.webshop.expert import Shopper
from step_ray.envs.webshop.generator import generate_shop
from step_ray.envs.webshop.goals import list_goals
from step_ray.envs.webshop.session import Place
from step_ray.errors import ConfigError, DataError, EnvError
from step_ray.tasks import build_tasks
from step_ray.tools.play import Session, new_task
from step_ray.types import Task, VerdictLabel

ROOT = Path(__file__).resolve().parents[2]
DATA = os.environ.get("WEBSHOP_DATA", "")


def config(folder, *, tasks=None, **section):
    section = {"generator": {"num_products": 60}} | section
    tasks = {"num_expert": 5, "num_collect": 4, "num_eval": 3, "eval_split": "test"} | (tasks or {})
    env = {"name": "webshop", "webshop": section}
    return parse_config({"name": "r", "output_dir": str(folder), "env": env, "tasks": tasks})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with a generated shop."""
    path = tmp_path_factory.mktemp("run")
    task_source("webshop").prepare(config(path))
    return path


@pytest.fixture
def tasks(folder):
    return task_source("webshop").training_tasks(config(folder))


def official(folder):
    """A folder like WEBSHOP_DATA: a generated shop in the official files."""
    generate_shop(folder, 200, 0)
    return {"source": "official", "data_dir": str(folder), "cache_dir": str(folder / "cache")}


def play(task, actions, env=None):
    """The (action, observation) pairs of these actions, and the last answer."""
    env = env or make_env("webshop")
    first, history, step = env.reset(task), [], None
    for action in actions:
        step = env.step(action)
        history.append((action, step.observation))
    return first, history, step


def expert_actions(task, limit=15):
    expert, env, history = make_expert(task), make_env("webshop"), []
    first, done = env.reset(task), False
    while not done and len(history) < limit:
        action = expert.propose(first, history)[1]
        step = env.step(action)
        history.append((action, step.observation))
        done = step.done
    return [action for action, _ in history], step


# Tasks and settings


def test_the_same_seed_makes_the_same_files(tmp_path):
    for name in ("a", "b"):
        generate_shop(tmp_path / name, 40, 3)
    generate_shop(tmp_path / "c", 40, 4)
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "abc")
    assert a == b
    assert a != c


def test_ids_name_product_and_content_and_are_unique(tasks):
    ids = [task.task_id for task in tasks]
    assert len(set(ids)) == len(ids) > 100
    assert all(re.fullmatch(r"webshop/synthetic/B0\w{8}/[0-9a-f]{12}(-\d+)?", i) for i in ids)
    assert {task.task_type for task in tasks} == {
        *("beauty", "electronics", "fashion", "garden", "grocery")
    }


def test_no_product_of_a_generated_test_split_is_trained_on(folder):
    lists = build_tasks(config(folder, tasks={"num_expert": 100, "num_eval": 50}))
    trained = {task.params["asin"] for task in (*lists.expert, *lists.collect)}
    assert not trained & {task.params["asin"] for task in lists.evaluate}
    assert lists.num_duplicates == 0


def test_the_official_ranges_of_the_goals(tmp_path):
    section = official(tmp_path)
    source = task_source("webshop")
    held_out = source.held_out_tasks(config(tmp_path, **section), "test")
    dev = source.held_out_tasks(config(tmp_path, **section), "dev")
    train = source.training_tasks(config(tmp_path, **section))
    goals = list_goals(open_catalogue(train[0].params["catalogue"]), "synthetic", 0)
    assert (len(held_out), len(dev), len(train)) == (500, 1000, len(goals) - 1500)
    first = {(goal.asin, goal.content()) for goal in goals[:500]}
    assert {(t.params["asin"], t.params["content"]) for t in held_out} == first


def test_agentgyms_lists_name_goals_by_position(tmp_path):
    section = official(tmp_path) | {"splits": "agentgym", "split_dir": str(tmp_path)}
    for split, numbers in (("test", [7, 3]), ("train", range(10, 40))):
        items = [{"item_id": f"webshop_{number}"} for number in numbers]
        (tmp_path / f"ids_webshop_{split}.json").write_text(json.dumps(items))
    settings = config(tmp_path, tasks={"num_eval": 2}, **section)
    task_source("webshop").check(settings)
    held_out = task_source("webshop").held_out_tasks(settings, "test")
    goals = list_goals(open_catalogue(held_out[0].params["catalogue"]), "synthetic", 0)
    assert {task.goal for task in held_out} == {goals[3].instruction, goals[7].instruction}
    (tmp_path / "ids_webshop_test.json").write_text('[{"item_id": "webshop_99999"}]')
    with pytest.raises(DataError, match=r"webshop_99999 is beyond the \d+ goals"):
        task_source("webshop").held_out_tasks(settings, "test")


def test_a_goal_that_is_evaluated_on_is_left_out_of_training(tmp_path):
    section = official(tmp_path) | {"splits": "agentgym", "split_dir": str(tmp_path)}
    for split, numbers in (("test", [1, 2]), ("train", range(30))):
        items = [{"item_id": f"webshop_{number}"} for number in numbers]
        (tmp_path / f"ids_webshop_{split}.json").write_text(json.dumps(items))
    lists = build_tasks(config(tmp_path, tasks={"num_eval": 2}, **section))
    assert lists.num_duplicates == 2


def test_another_price_seed_changes_limits_and_nothing_else(folder):
    source = task_source("webshop")
    one = source.training_tasks(config(folder))
    other = source.training_tasks(config(folder, price_seed=1))
    assert [task.task_id for task in one] == [task.task_id for task in other]
    assert [task.goal for task in one] != [task.goal for task in other]
    assert source.fingerprints(one) == source.fingerprints(other)


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"engine": "textworld"}, "env: engine says nothing to env.name 'webshop'; remove it"),
        ({"scienceworld": {"heap_mb": 99}}, "env: scienceworld says nothing to env.name 'webshop'"),
        ({"task_types": ["toys"]}, "env: task_types: 'toys' is no task type of webshop"),
        ({"webshop": {"observation": "html"}}, "env.webshop.observation: Input should be 'text'"),
        ({"webshop": {"seed": 1}}, "env.webshop.seed: unknown key; use one of ['annotations', "),
    ],
)
def test_settings_that_make_no_sense_are_refused(env, line):
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "r", "env": {"name": "webshop", **env}})
    assert str(caught.value).startswith(line)


def test_other_environments_have_no_use_for_the_section():
    with pytest.raises(ConfigError, match=r"^env: webshop says nothing to env.name 'alfworld'"):
        parse_config({"name": "r", "env": {"webshop": {"price_seed": 1}}})


@pytest.mark.parametrize(
    ("section", "split", "line"),
    [
        ({}, "dev", r"^tasks.eval_split: 'dev' is no held-out split here; use one of \('test',\)$"),
        ({"source": "official", "data_dir": "/nowhere"}, "test", r"holds no items_shuffle\*\.json"),
        ({"source": "official", "data_dir": "$NONE"}, "test", r"names a variable that is not set"),
    ],
)
def test_what_is_missing_is_told_before_any_work(tmp_path, section, split, line):
    with pytest.raises(ConfigError, match=line):
        task_source("webshop").check(config(tmp_path, tasks={"eval_split": split}, **section))


def test_of_several_files_of_products_one_must_be_named(tmp_path):
    section = official(tmp_path)
    (tmp_path / "items_shuffle_1000.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"^env\.webshop\.products: .*name the one to use$"):
        task_source("webshop").check(config(tmp_path, **section))
    named = config(tmp_path, products="items_shuffle.json", **section)
    task_source("webshop").check(named)


@pytest.mark.parametrize("name", ["webshop_cpu", "webshop_llama2_7b"])
def test_the_shipped_configurations_are_valid(name):
    assert load_config(ROOT / "jobs" / "configs" / f"{name}.yaml").env.name == "webshop"


# The environment


def test_buying_the_right_thing_is_a_success(tasks):
    actions, step = expert_actions(tasks[0])
    assert actions[0].startswith("search[")
    assert actions[-1] == "click[buy now]"
    assert (step.done, step.success, step.reward) == (True, True, 1.0)
    assert step.observation.startswith("Thank you for shopping with us! [SEP] Your code:")


def test_the_expert_buys_what_every_goal_asks_for(tasks):
    for task in tasks[::20]:
        assert expert_actions(task)[1].success, task.goal


def test_buying_without_options_gives_a_part_of_the_reward(tasks):
    task = tasks[0]
    wanted = (
        len(json.loads(task.params["options"])) + len(json.loads(task.params["attributes"])) + 1
    )
    actions = [a for a in expert_actions(task)[0] if not _is_option(task, a)]
    step = play(task, actions)[2]
    assert (step.success, step.reward) == (False, pytest.approx(1 - 2 / wanted))


def _is_option(task, action):
    return any(action == f"click[{value}]" for _, value in json.loads(task.params["options"]))


def test_a_no_op_shows_the_same_page(tasks):
    first, history, step = play(tasks[0], ["click[buy now]"])
    assert (step.noop, step.done, step.reward) == (True, False, 0.0)
    assert history[0][1] == first


def test_the_past_can_stand_before_an_observation(tasks):
    env = make_env("webshop", num_prev_obs=1, num_prev_actions=2)
    first, history, _ = play(tasks[0], ["click[x]", "click[y]"], env)
    assert history[1][1].count("WebShop [SEP]") == 2
    assert history[1][1].split(" [SEP] ")[0] == "click[x]"
    assert history[1][1].endswith(f"click[y] [SEP] {first}")


def test_actions_are_listed_with_one_entry_for_all_searches(tasks):
    env = make_env("webshop")
    env.reset(tasks[0])
    assert env.admissible_actions() == ["search[<keywords>]"]
    env.step("search[shirts]")
    listed = env.admissible_actions()
    assert listed[:3] == ["search[<keywords>]", "click[back to search]", "click[next >]"]
    assert all(is_listed(action, listed) for action in listed)
    assert is_listed("search[red shoes]", listed)
    assert not is_listed("search[]", listed)
    assert not is_listed("click[red shoes]", listed)


@pytest.mark.parametrize("changed", [{"catalogue": "/nowhere"}, {"options": "{"}, {"asin": None}])
def test_a_task_that_is_no_goal_is_refused(tasks, changed):
    params = {k: v for k, v in {**tasks[0].params, **changed}.items() if v is not None}
    task = Task(task_id="t", env="webshop", split="train", goal="x", params=params)
    with pytest.raises(EnvError):
        make_env("webshop").reset(task)


def test_a_step_before_a_reset_is_refused():
    with pytest.raises(EnvError, match=r"^webshop: called before reset or after close$"):
        make_env("webshop").step("search[x]")


def test_an_unknown_observation_mode_is_refused():
    with pytest.raises(ConfigError, match=r"^env.webshop.observation: 'html' is not known"):
        make_env("webshop", observation="html")


# The teacher


@pytest.fixture
def course(tasks):
    """A task whose product the first search finds on its first page, and the expert's way."""
    for task in tasks:
        actions = expert_actions(task)[0]
        if len(actions) == 5 and actions[1] == f"click[{task.params['asin'].lower()}]":
            return task, actions
    raise AssertionError("no plain task")


def judge(task, before, action, executed=True):
    first, history, _ = play(task, [*before, action])
    observation = history[-1][1] if executed else None
    return make_expert(task).judge(first, history[:-1], action, observation)


def other_product(task, search):
    env = make_env("webshop")
    env.reset(task)
    env.step(search)
    own = f"click[{task.params['asin'].lower()}]"
    return next(a for a in env.admissible_actions() if a.startswith("click[b0") and a != own)


def test_every_step_of_the_expert_is_good_before_and_after_it_is_done(course):
    task, actions = course
    for number, action in enumerate(actions):
        for executed in (True, False):
            verdict = judge(task, actions[:number], action, executed)
            assert verdict.label is VerdictLabel.GOOD


def test_a_wrong_product_is_an_error_and_the_way_leads_back(course):
    task, (search, product, *_) = course
    wrong = other_product(task, search)
    verdict = judge(task, [search], wrong)
    assert (verdict.label, verdict.error_type) == (VerdictLabel.ERROR, "wrong_product")
    assert verdict.action == "click[< prev]"
    unexecuted = judge(task, [search], wrong, executed=False)
    assert unexecuted.action == product
    assert judge(task, [search, wrong], "click[< prev]").label is VerdictLabel.GOOD


def test_buying_with_a_missing_option_is_too_early(course):
    task, actions = course
    verdict = judge(task, actions[:3], "click[buy now]", executed=False)
    assert (verdict.label, verdict.error_type) == (VerdictLabel.ERROR, "bought_early")
    assert verdict.action == actions[3]
    assert actions[3].removeprefix("click[").removesuffix("]") in verdict.reflection


def test_buying_a_wrong_product_is_an_error(course):
    task, (search, *_) = course
    wrong = other_product(task, search)
    verdict = judge(task, [search, wrong], "click[Buy Now]", executed=False)
    assert (verdict.error_type, verdict.action) == ("wrong_product", "click[< prev]")


@pytest.mark.parametrize(
    ("steps", "action", "label", "error_type"),
    [
        (1, "click[next >]", "suboptimal", "needless_page"),
        (1, "search[qqqzzz]", "suboptimal", "needless_search"),
        (1, "click[back to search]", "suboptimal", "detour"),
        (0, "search[qqqzzz]", "suboptimal", "poor_search"),
        (2, "click[features]", "suboptimal", "needless_look"),
        (2, "click[< prev]", "suboptimal", "detour"),
        (2, "search[shirt]", "suboptimal", "detour"),
        (0, "click[search]", "error", "no_op"),
        (1, "click[purple elephant]", "error", "no_op"),
        (1, "buy it", "error", "no_op"),
        (1, "", "error", "bad_format"),
    ],
)
def test_faults_are_told_apart(course, steps, action, label, error_type):
    task, actions = course
    verdict = judge(task, actions[:steps], action)
    assert (verdict.label.value, verdict.error_type) == (label, error_type)
    assert verdict.reflection
    assert verdict.action


def test_choosing_the_same_option_again_is_idle_and_options_have_no_order(course):
    task, actions = course
    again = judge(task, actions[:3], actions[2])
    assert (again.label, again.error_type) == (VerdictLabel.SUBOPTIMAL, "repeated")
    assert judge(task, actions[:2], actions[3]).label is VerdictLabel.GOOD


def test_a_wrong_option_is_put_right(course):
    task, actions = course
    values = {v for _, group in Shopper(task).product.options for v in group}
    wanted = {value for _, value in json.loads(task.params["options"])}
    wrong = f"click[{min(values - wanted)}]"
    verdict = judge(task, actions[:2], wrong)
    assert (verdict.label, verdict.error_type) == (VerdictLabel.ERROR, "wrong_option")
    assert "should be" in verdict.reflection
    assert verdict.action in actions[2:4]


def test_after_an_error_the_expert_still_buys_the_right_thing(course):
    task, (search, *_) = course
    expert, env = make_expert(task), make_env("webshop")
    first, history, step = env.reset(task), [], None
    for action in (search, other_product(task, search), "click[features]", "click[back to search]"):
        history.append((action, env.step(action).observation))
    while step is None or (not step.done and len(history) < 20):
        action = expert.propose(first, history)[1]
        step = env.step(action)
        history.append((action, step.observation))
    assert step.success


# Play


def test_a_shop_is_played_by_hand_with_hints(tmp_path):
    task = new_task("webshop", "", tmp_path, seed=1)
    session = Session(make_env("webshop"), task, make_expert(task))
    assert "Instruction:" in session.start()
    while not session.over and len(session.history) < 15:
        session.answer(session.answer("hint").rpartition(" -> ")[2])
    assert session.verdict().endswith("reward 1")
    with pytest.raises(ConfigError, match=r"^env: 'chess' cannot be played by hand; use one of"):
        new_task("chess", "", tmp_path, seed=1)


# The released data


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    names = ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json")
    files = [Path(DATA) / name for name in names]
    return open_catalogue(build_catalogue(tmp_path_factory.mktemp("shop"), *files))


def recorded(name):
    path = Path(DATA) / name
    if not path.is_file():
        pytest.skip(f"WEBSHOP_DATA holds no {name}")
    return path


needs_data = pytest.mark.skipif(not DATA, reason="WEBSHOP_DATA is not set")


@needs_data
def test_all_scored_purchases_are_scored_the_same(released):
    vectors = json.loads(recorded("reward_vectors.json").read_text())
    assert [v for v in vectors if replay.check_vector(v, released)] == []


@needs_data
def test_the_recorded_searches_find_the_same_and_the_pages_read_the_same(released):
    episodes = list(replay.read_episodes(recorded("agenttraj_webshop_400.jsonl")))
    found = replay.compare_searches([turns for _, turns in episodes], released)
    assert (found.searches, found.first_same, found.all_same) == (400, 400, 400)
    goals = list_goals(released, "synthetic", 0)
    report = replay.replay(episodes, goals, released, recorded_limits=True)
    assert dict(report.steps) == {"identical": 2016}


@needs_data
def test_the_released_goals_stand_in_the_official_order(released):
    goals = list_goals(released, "synthetic", 0)
    lines = recorded("synthetic_goals_6910_seed233.jsonl").read_text().splitlines()
    expected = [json.loads(line) for line in lines]
    assert [(g.asin, dict(g.options)) for g in goals] == [
        (e["asin"], e["goal_options"]) for e in expected
    ]


def test_differences_are_told_apart():
    limit = ", and price lower than {} dollars"
    left, right = (f"Instruction: [SEP] a{limit.format(n)} [SEP] x" for n in ("10.00", "20.00"))
    assert replay.difference(left, left) == "identical"
    assert replay.difference(left, right) == replay.PRICE_LIMIT
    assert replay.difference("Page 1 [SEP] a [SEP] b", "Page 1 [SEP] b [SEP] a") == (
        "order of the parts"
    )
    assert replay.difference("Page 1 [SEP] a", "Page 1 [SEP] b") == "other results"


def test_the_expert_tries_other_words_when_the_first_ones_fail(tasks):
    shopper = Shopper(tasks[0])
    shopper.queries = ("qqqzzz", shopper.queries[-1])
    visit = shopper.replay([])
    moves = []
    for _ in range(3):
        moves.append(shopper.next_move(visit).action)
        visit.do(moves[-1])
    assert moves[0] == "search[qqqzzz]"
    assert moves[1] == f"search[{shopper.queries[-1]}]"
    assert visit.session.state.place in (Place.ITEM, Place.RESULTS)
