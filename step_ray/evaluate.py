"""Evaluation: a model behind an endpoint plays the held-out tasks in the same episode loop.

Takes a config, an endpoint and a task list, gives an `EvalReport` with intervals. Trajectories stay
on disk, so that every number can be looked up and a killed evaluation goes on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from step_ray.collect import run_episodes
from step_ray.collection.agentplay import AgentPlayer
from step_ray.collection.runner import Address, EpisodePlan
from step_ray.config import RunConfig
from step_ray.evaluation.evalreport import summarize
from step_ray.store import Outcome, read_trajectories
from step_ray.tasks import read_tasks
from step_ray.types import EvalReport, Source


def evaluate(
    config: RunConfig,
    agent: Address,
    *,
    tasks_file: Path,
    out_dir: Path,
    on_episode: Callable[[Outcome], None] | None = None,
    on_begin: Callable[[], None] | None = None,
    where: Literal["actors", "agent"] = "actors",
) -> EvalReport:
    """Play every task once per seed, without a teacher; Ray must be running.

    Args:
        config: limits, prompt, seeds and confidence.
        agent: who plays, behind an OpenAI-compatible endpoint; its name is that in the report.
        tasks_file: task manifest.
        out_dir: folder of the trajectories; what is there is kept.
        on_episode: called for each finished episode, those on disk first.
        on_begin: called between these and those that are played now.
        where: who runs the environments, see `EvaluateConfig`; `agent`: the endpoint is that of
            `config.served`.

    Raises:
        EpisodesError: too many episodes ended by an error, see `run_episodes`.
    """
    plan = EpisodePlan.from_config(
        config,
        Source.STUDENT,
        student=agent,
        temperature=config.evaluate.temperature,
        episodes_per_actor=config.evaluate.concurrency,
    )
    seeds = config.evaluate.seeds
    player = AgentPlayer(plan) if where == "agent" else None
    summary = run_episodes(
        read_tasks(tasks_file),
        plan,
        out_dir,
        seeds=seeds,
        on_episode=on_episode,
        on_begin=on_begin,
        player=player,
    )
    return summarize(
        agent.model,
        read_trajectories(out_dir),
        config.evaluate.confidence,
        seconds=summary.seconds,
        seed=seeds[0],
        scoring=config.env.scoring,
    )
