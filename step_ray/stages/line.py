"""The stages of a run: what each one needs, which settings define it, and what it does.

Takes a `RunConfig`, gives the ordered list of `Stage`s. A stage reads and writes files under the
run folder only; whether it has to run at all is pipeline.py's business.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from step_ray.collection.teacher_config import TEACHER_ADDRESS
from step_ray.config import BASE, RunConfig
from step_ray.stages.base import Stage, StageContext
from step_ray.stages.training import model_stages, needs_collection
from step_ray.types import Source

SPEED_ONLY = {
    *("num_actors", "min_actors", "node_labels", "episodes_per_actor", "cpus_per_actor"),
    *("rows_per_shard", "max_error_share", "max_errors", "errors_judged_after", "retry_errors"),
    *("max_starts", "try_timeout_s"),
}
"""Settings of `collect` that change how fast and with how many faults, not what."""
OWN_SEED_STEP = 1000
"""Between the seeds of two rollouts of a task; a turn adds its number to the seed."""


def build_stages(config: RunConfig) -> list[Stage]:
    """The stages of a run in the order in which they are done."""
    stages = [_tasks(config), _expert(config)]
    if config.student.init == "scratch":
        stages.append(_student(config))
    stages += model_stages(config, BASE)
    if needs_collection(config):
        stages.append(_collect(config))
    if any(arm.own_success for arm in config.arms.values()):
        stages.append(_own(config))
    for arm in config.arms:
        stages += model_stages(config, arm)
    models = [BASE, *config.arms]
    stages += [_evaluate(config, model) for model in models]
    return [*stages, _report(config, [f"evaluate:{model}" for model in models])]


def _tasks(config: RunConfig) -> Stage:
    settings: dict[str, Any] = {
        "seed": config.seed,
        "tasks": config.tasks.model_dump(),
        "env": config.env.task_settings(),
    }

    def run(context: StageContext) -> Mapping[str, Any]:
        from step_ray.envs import task_source
        from step_ray.tasks import build_tasks, write_tasks

        task_source(config.env.name).prepare(config)
        lists = build_tasks(config)
        for name in ("expert", "collect", "evaluate"):
            write_tasks(context.root / "tasks" / f"{name}.parquet", getattr(lists, name))
        return {
            "num_expert": len(lists.expert),
            "num_collect": len(lists.collect),
            "num_evaluate": len(lists.evaluate),
            "num_duplicates_left_out": lists.num_duplicates,
        }

    return Stage(name="tasks", needs=(), settings=settings, outputs=("tasks", "games"), run=run)


def _episode_settings(config: RunConfig) -> dict[str, Any]:
    """What defines an episode apart from its players."""
    return {"env": config.env.episode_settings()}


def _expert(config: RunConfig) -> Stage:
    lists = {"golden": "expert"}
    if config.teacher.reference or any(arm.golden_collect for arm in config.arms.values()):
        lists["golden_collect"] = "collect"
    settings = {**_episode_settings(config), "lists": lists}

    def run(context: StageContext) -> Mapping[str, Any]:
        from step_ray.collection.listplay import play_list
        from step_ray.collection.runner import EpisodePlan

        plan = EpisodePlan.from_config(config, Source.EXPERT, student=None)
        return {
            out: play_list(context, plan, tasks, f"trajectories/{out}", (config.seed,))
            for out, tasks in lists.items()
        }

    outputs = tuple(f"trajectories/{out}" for out in lists)
    return Stage(name="expert", needs=("tasks",), settings=settings, outputs=outputs, run=run)


def _student(config: RunConfig) -> Stage:
    settings = {"student": config.student.model_dump(), "seed": config.seed}

    def run(context: StageContext) -> Mapping[str, Any]:
        from step_ray.store import read_trajectories
        from step_ray.training.student import new_model, save_student, train_tokenizer

        golden = read_trajectories(context.root / "trajectories/golden")
        texts = [m.content for t in golden for m in t.prompt]
        texts += [x for t in golden for s in t.steps for x in (s.text, s.observation or "")]
        shape = config.student.scratch
        tokenizer = train_tokenizer(texts, shape.vocab_size)
        model = new_model(tokenizer, shape, max_length=config.student.max_length, seed=config.seed)
        save_student(context.root / "models" / "student", model, tokenizer)
        return {"num_parameters": model.num_parameters(), "vocab_size": len(tokenizer)}

    return Stage(
        name="student",
        needs=("expert",),
        settings=settings,
        outputs=("models/student",),
        run=run,
    )


def _collect(config: RunConfig) -> Stage:
    endpoint = config.collect.endpoint
    settings = {
        **_episode_settings(config),
        "teacher": config.teacher.model_dump(exclude=TEACHER_ADDRESS),
        "collect": config.collect.model_dump(exclude={*SPEED_ONLY, "endpoint"}),
        **({"student": endpoint.model} if endpoint else {}),
        "seed": config.seed,
    }

    def run(context: StageContext) -> Mapping[str, Any]:
        from step_ray.collection.listplay import play_list
        from step_ray.collection.runner import EpisodePlan
        from step_ray.store import read_trajectories

        references = {}
        if config.teacher.reference:
            golden = read_trajectories(context.root / "trajectories/golden_collect")
            references = {t.task.task_id: t.steps for t in golden if t.success}
        plan = EpisodePlan.from_config(
            config,
            Source.SELF_REFLECTED,
            student=_student_address(context),
            teacher=config.teacher,
            temperature=config.collect.temperature,
            references=references,
        )
        return play_list(context, plan, "collect", "trajectories/collect", (config.seed,))

    student = () if endpoint else ("train:base",)
    needs = ("tasks", *student, *(("expert",) if config.teacher.reference else ()))
    return Stage(
        name="collect",
        needs=needs,
        settings=settings,
        outputs=("trajectories/collect",),
        run=run,
        limits=frozenset(f"teacher.budget.{name}" for name in ("calls", "tokens", "money")),
    )


def _student_address(context: StageContext) -> Any:
    """Where the student of the collection answers; the base agent is served if it has to be."""
    from step_ray.collection.runner import Address

    given = context.config.collect.endpoint
    if given is not None:
        return Address(base_url=given.base_url, model=given.model, api_key_env=given.api_key_env)
    return _own_address(context, BASE)


def _own_address(context: StageContext, model: str) -> Any:
    """Where a model of the run answers; it is served if it has to be."""
    from step_ray.collection.runner import Address

    return Address(
        base_url=context.serve(model).base_url,
        model=model,
        api_key_env=context.config.serve.api_key_env,
        has_many_keys=True,
    )


def _own(config: RunConfig) -> Stage:
    """Rollouts of the base agent alone, whose successes are what rejection fine-tuning trains."""
    own = config.own
    seeds = tuple(config.seed + OWN_SEED_STEP * i for i in range(own.num_samples))
    settings = {
        **_episode_settings(config),
        "own": own.model_dump(),
        "max_new_tokens": config.collect.max_new_tokens,
        "max_format_errors": config.collect.max_format_errors,
        "seed": config.seed,
    }

    def run(context: StageContext) -> Mapping[str, Any]:
        from step_ray.collection.listplay import play_list
        from step_ray.collection.runner import EpisodePlan

        plan = EpisodePlan.from_config(
            config,
            Source.STUDENT,
            student=_own_address(context, BASE),
            temperature=own.temperature,
        )
        return play_list(context, plan, "collect", "trajectories/own", seeds)

    needs = ("tasks", "train:base")
    outputs = ("trajectories/own",)
    return Stage(name="own", needs=needs, settings=settings, outputs=outputs, run=run)


def _evaluate(config: RunConfig, model: str) -> Stage:
    settings = {
        **_episode_settings(config),
        "evaluate": config.evaluate.model_dump(exclude={"concurrency", "where", "confidence"}),
        "max_new_tokens": config.collect.max_new_tokens,
        "max_format_errors": config.collect.max_format_errors,
        "before_execution": config.teacher.when == "before_execution",
    }

    def run(context: StageContext) -> Mapping[str, Any]:
        address = _own_address(context, model)
        return play_held_out(context, address, model, where=config.evaluate.where)

    return Stage(
        name=f"evaluate:{model}",
        needs=("tasks", f"train:{model}"),
        settings=settings,
        outputs=(f"evaluate/{model}",),
        run=run,
    )


def play_held_out(
    context: StageContext, agent: Any, name: str, *, where: Literal["actors", "agent"]
) -> Mapping[str, Any]:
    """Let the agent at a `runner.Address` play the held-out tasks into `evaluate/<name>`.

    Returns:
        The report as the stage keeps it.
    """
    from step_ray.collection.listplay import shown_episodes
    from step_ray.evaluate import evaluate
    from step_ray.tasks import read_tasks

    config, tasks_file = context.config, context.root / "tasks/evaluate.parquet"
    total = len(read_tasks(tasks_file)) * len(config.evaluate.seeds)
    with shown_episodes(context.reporter, f"evaluate {name}", total) as shown:
        report = evaluate(
            config,
            agent,
            tasks_file=tasks_file,
            out_dir=context.root / "evaluate" / name,
            on_episode=shown.add,
            on_begin=shown.begin,
            where=where,
        )
    return asdict(report)


def _report(config: RunConfig, needs: list[str]) -> Stage:
    def run(context: StageContext) -> Mapping[str, Any]:
        from step_ray.stages.summary import write_run_report

        return {"file": str(write_run_report(context.config, context.reporter.console))}

    return Stage(
        name="report",
        needs=tuple(needs),
        settings={"confidence": config.evaluate.confidence},
        outputs=("report",),
        run=run,
    )
