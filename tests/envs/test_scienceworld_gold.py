"""Gold paths on the real engine: made, freed of refused steps, played by the expert, mended."""

import asyncio
import json

import pytest

from step_ray.collection.player import HistoryPlayer
from step_ray.envs import make_env
from step_ray.envs.scienceworld import jvm
from step_ray.envs.scienceworld.gold import GoldMaker, GoldPath
from step_ray.envs.scienceworld.goldcache import with_gold
from step_ray.envs.scienceworld.tasks import make_task
from step_ray.envs.scienceworld.text import is_noop
from step_ray.rollout import EpisodeSettings, run_episode
from step_ray.teacher import ExpertStudent, OracleTeacher
from step_ray.types import Source, StepKind, StopReason

pytest.importorskip("scienceworld", reason="the extra `scienceworld` is not installed")
HEAP_MB = 512
NAME, VARIATION = "find-non-living-thing", 225


def made(name, variation):
    row = GoldMaker("easy", HEAP_MB)({"task": name, "variation": variation})
    return json.loads(row["record"])


@pytest.fixture(scope="module")
def record():
    yield made(NAME, VARIATION)
    jvm.shared_pool(HEAP_MB).close()


@pytest.fixture
def task(record):
    return with_gold(make_task(NAME, VARIATION, "test"), GoldPath(**record))


def play(task, student, teacher=None):
    return asyncio.run(
        run_episode(
            task,
            make_env("scienceworld", heap_mb=HEAP_MB),
            student,
            settings=EpisodeSettings(prompt="scienceworld_short", show_admissible=False),
            source=Source.SELF_REFLECTED if teacher else Source.EXPERT,
            teacher=teacher,
        )
    )


def test_a_path_reaches_the_full_score_without_refused_steps(record):
    assert (record["score"], record["error"]) == (100, "")
    assert record["engine"] == "scienceworld 1.2.3"
    assert record["seconds"] > 0
    assert not [text for text in record["observations"] if is_noop(text)]
    assert len(record["actions"]) == len(record["observations"]) == len(record["subgoals"])
    assert len(record["actions"]) < record["num_raw_actions"]
    assert record["subgoals"][-1] == "move living thing to answer box"


def test_an_impossible_variation_is_told_in_the_row():
    assert made(NAME, 300)["error"] == (
        "scienceworld/find-non-living-thing/300: 'find-non-living-thing' has the variations"
        " 0 to 299, not 300"
    )


def test_the_expert_plays_the_path_to_the_full_score(task, record):
    got = play(task, ExpertStudent(task))
    assert (got.stop_reason, got.reward, got.best_reward) == (StopReason.SUCCESS, 1.0, 1.0)
    assert [step.action for step in got.steps] == record["actions"]
    assert got.engine == "scienceworld 1.2.3"


class Stumbler(HistoryPlayer):
    """Follows the path, but first goes out of it in three ways."""

    name = "stumbler"

    def __init__(self, task):
        self._expert = ExpertStudent(task)
        self._wrong = ["dance", "teleport to foundry", "open blast furnace"]

    def play(self, first, history, draw):
        if self._wrong:
            return "Let me see.", self._wrong.pop(0)
        return self._expert.play(first, history, draw)


def test_the_oracle_leads_a_stumbling_student_to_the_full_score(task):
    got = play(task, Stumbler(task), OracleTeacher("scienceworld"))
    assert (got.stop_reason, got.reward) == (StopReason.SUCCESS, 1.0)
    errors = [s.verdict.error_type for s in got.steps if s.verdict and s.verdict.error_type]
    assert errors[:2] == ["no_op", "detour"]
    assert sum(step.kind is StepKind.CORRECTION for step in got.steps) == len(errors)
