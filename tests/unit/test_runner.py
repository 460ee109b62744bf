"""The rollout actor: what it does when a client cannot be made."""

import asyncio
import json

from step_ray.rollout import EpisodeSettings
from step_ray.runner import EpisodePlan, EpisodeRunner
from step_ray.teacher_config import TeacherConfig
from step_ray.types import Source


def test_without_the_teachers_key_no_episode_is_played_without_a_teacher(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    teacher = TeacherConfig(
        kind="llm", base_url="http://127.0.0.1:9/v1", model="m", api_key_env="NO_SUCH_KEY"
    )
    runner = EpisodeRunner(
        EpisodePlan(
            source=Source.SELF_REFLECTED,
            settings=EpisodeSettings(prompt="alfworld_short"),
            env="alfworld",
            teacher=teacher,
        )
    )
    task = {"task_id": "t", "env": "alfworld", "split": "train", "goal": "", "task_type": ""}
    row = {**task, "params": "{}", "seed": 0}

    async def play_twice():
        return [await runner(row), await runner(row)]

    records = [json.loads(answer["record"]) for answer in asyncio.run(play_twice())]

    assert [r["stop_reason"] for r in records] == ["env_error", "env_error"]
    assert all("'NO_SUCH_KEY' is not set" in r["error"] for r in records)
