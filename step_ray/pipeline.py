"""The line: runs the stages of a config in order, skips what is done, goes on where it was killed.

Takes a `RunConfig`, leaves a run folder. It decides whether a stage runs; what a stage does is
stages/line.py's, and what the folder remembers is runfolder.py's.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from step_ray.calls.endpoint import NO_KEY
from step_ray.calls.firstcall import CHECK_TIMEOUT_S, check_chat, check_endpoint
from step_ray.cluster.nodes import check_folder, check_nodes, node_addresses, reach_fault
from step_ray.cluster.resources import place, refuse_locally
from step_ray.config import RunConfig
from step_ray.errors import ConfigError, RunStateError, StepRayError
from step_ray.progress import Reporter
from step_ray.stages.base import Stage, StageContext
from step_ray.stages.line import build_stages
from step_ray.storage.mirror import bring_state
from step_ray.storage.objects import check_access
from step_ray.storage.places import shown, url_of
from step_ray.storage.remote import push
from step_ray.storage.runfolder import FINISHED, STARTED, UNFINISHED, Change, RunFolder
from step_ray.storage.runinfo import run_info
from step_ray.store import atomic, read_json, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that a run needs before it starts."""

    what: str
    fault: str | None
    """None: it is there."""
    error: StepRayError | None = None


def preflight(config: RunConfig, stages: Sequence[str], *, ask: bool = False) -> list[Check]:
    """Look at all that can be known before any work: model, games, key, endpoint, local resources.

    Args:
        config: the run.
        stages: names of those to do; the others' resources are not asked for.
        ask: send each endpoint that the stages need a request of one word, too.
    """
    from step_ray.envs import task_source
    from step_ray.react import load_prompt
    from step_ray.training.chat_template import ChatSettings
    from step_ray.training.kernels import check_liger
    from step_ray.training.student import check_student, model_type

    teacher = config.teacher

    def environment_is_known() -> None:
        from step_ray.envs import make_env

        make_env(config.env.name, **config.env.options()).close()

    def prompts_are_known() -> None:
        for version in (config.env.prompt, teacher.prompt):
            load_prompt(version)

    checks: dict[str, Callable[[], object]] = {
        f"environment {config.env.name}": environment_is_known,
        f"prompts {config.env.prompt}, {teacher.prompt}": prompts_are_known,
        "tasks": lambda: task_source(config.env.name).check(config),
    }
    if url := url_of(config.run_dir):
        checks[f"store {url}"] = lambda: check_access(config.run_dir)
    if config.ray.address == "local":
        checks["resources of a local cluster"] = lambda: refuse_locally(config, stages)
    asks = ask and "collect" in stages
    # the tasks, and models that are served elsewhere, need neither teacher nor student
    plays = any(not name.startswith(("tasks", "outside:")) for name in stages)
    if plays and teacher.kind == "llm":
        checks[f"teacher {teacher.model} at {teacher.base_url}"] = lambda: _teacher(config, asks)
    given = config.collect.endpoint
    if plays and given is not None:
        checks[f"student {given.model} at {given.base_url}"] = lambda: _student(config, asks)
    # last, because a hub id without a network is tried several times
    student = config.student
    chat = ChatSettings.of(student)
    if plays:
        checks[f"student {student.init}"] = lambda: check_student(
            student.init, chat, student.max_length
        )
        wants_liger = config.train.liger or config.arm_train().liger
        # on a cluster the workers' nodes have the kernels, and this one may not
        if wants_liger and config.ray.address == "local":
            checks["kernels of Liger"] = lambda: check_liger(model_type(student.init))
    return [_check(what, function) for what, function in checks.items()]


def _teacher(config: RunConfig, asks: bool) -> None:
    from step_ray.collect import read_key

    teacher = config.teacher
    key = read_key("teacher.api_key_env", teacher.api_key_env)
    where = ("teacher", teacher.base_url, teacher.model, key, CHECK_TIMEOUT_S)
    check_endpoint(*where)
    if asks:
        check_chat(
            *where,
            ("teacher.max_tokens", teacher.max_tokens),
            temperature=teacher.temperature,
            seed=config.seed,
            extra_body=teacher.extra_body,
        )


def _student(config: RunConfig, asks: bool) -> None:
    from step_ray.collect import read_key

    given, collect = config.collect.endpoint, config.collect
    assert given is not None
    name = "collect.endpoint"
    key = read_key(f"{name}.api_key_env", given.api_key_env) if given.api_key_env else NO_KEY
    where = (name, given.base_url, given.model, key, CHECK_TIMEOUT_S)
    check_endpoint(*where)
    if asks:
        check_chat(
            *where,
            ("collect.max_new_tokens", collect.max_new_tokens),
            temperature=collect.temperature,
            seed=config.seed,
        )


def _refuse_unreachable_agent(config: RunConfig, stages: Sequence[str]) -> None:
    """Refuse an address of the served agent that rollout actors elsewhere cannot use."""
    is_served = any(name.startswith("evaluate:") for name in stages) or (
        "collect" in stages and config.collect.endpoint is None
    )
    line = reach_fault(config.serve.host, node_addresses()) if is_served else None
    if line:
        raise ConfigError(line)


def _check(what: str, function: Callable[[], object]) -> Check:
    try:
        function()
    except StepRayError as exc:
        return Check(what=what, fault=str(exc), error=exc)
    return Check(what=what, fault=None)


def run(
    config: RunConfig,
    reporter: Reporter,
    *,
    only: Sequence[str] | None = None,
    redo: bool = False,
    more: Sequence[Stage] = (),
) -> None:
    """Do the stages that are not done; Ray is started if it has to be.

    Args:
        config: the run.
        reporter: shows progress.
        only: names of the stages to do; what they need must be done. None: all stages.
        redo: make stages again whose settings have changed, instead of refusing; their old
            outputs are moved to `replaced/`.
        more: stages beside those of the line.

    Raises:
        RunStateError: the folder holds a stage made with other settings, is in use, or lacks a
            stage that `only` needs.
        ConfigError, DataError, EndpointError: see the stages.
    """
    from step_ray.cluster.raysetup import connected

    bring_state(config)
    stages = [*build_stages(config), *more]
    chosen = [s for s in stages if only is None or s.name in only]
    folder = RunFolder(config.run_dir)
    todo = [stage.name for stage in _to_do(folder, chosen, redo, config.collect.retry_errors)]
    if not todo:
        reporter.line("every stage is done already")
        for stage in chosen:
            _tell_unfinished(folder, stage, reporter)
        return
    _refuse_missing_needs(folder, chosen)
    # before the lock, which is a file: a wrong input leaves none
    check_folder(config.run_dir)
    for check in preflight(config, todo, ask=True):
        if check.error:
            raise check.error
    with folder.locked(reporter.line), connected(config.ray):
        bring_state(config, is_ours=True)  # what others have done before the lock was ours
        context = StageContext(config, reporter)
        context.end_leftovers()
        if line := place(config, todo):
            reporter.line(f"[yellow]waits[/]   {line}")
        if config.ray.address != "local":
            check_nodes(config.run_dir)
            _refuse_unreachable_agent(config, todo)
        _write_run_files(config)
        try:
            for stage in chosen:
                _run_stage(folder, stage, context, redo)
        finally:
            context.stop_serving()


def _refuse_missing_needs(folder: RunFolder, stages: Sequence[Stage]) -> None:
    """Stages come in the order of the line, so a need among them is done when its turn is over."""
    names = {stage.name for stage in stages}
    for stage in stages:
        missing = [
            n for n in stage.needs if n not in names and folder.state(n).status not in FINISHED
        ]
        if missing:
            raise RunStateError(
                f"stage {stage.name} needs {', '.join(missing)};"
                " run `step-ray run` or that stage first"
            )


def _to_do(
    folder: RunFolder, stages: Sequence[Stage], redo: bool, retry_errors: bool
) -> list[Stage]:
    """The stages that are not done, or have errors to be played again; refuses changed settings
    before any work, unless `redo`.

    A change upstream shows downstream only once the upstream stage has been made again, so each
    stage is checked a second time when its turn comes.
    """
    todo: list[Stage] = []
    extended: set[str] = set()
    for stage in stages:
        changes = folder.changes(stage.name, _settings(folder, stage))
        retries = retry_errors and _num_errors(folder.state(stage.name).summary) > 0
        if _only_raises_limits(stage, changes) or (retries and not changes):
            extended.add(stage.name)
        elif changes and not redo:
            raise RunStateError(_refusal(folder, stage, changes))
        elif extended.intersection(stage.needs) and folder.digest(stage.name) and not redo:
            raise RunStateError(_outdated(folder, stage, extended))
        if changes or retries or folder.state(stage.name).status not in FINISHED:
            todo.append(stage)
    return todo


def _num_errors(summary: Mapping[str, Any]) -> int:
    """Episodes that ended by an error, in a summary of one or of several lists."""
    lists = [summary, *(part for part in summary.values() if isinstance(part, Mapping))]
    return sum(int(part.get("num_errors", 0)) for part in lists)


def _only_raises_limits(stage: Stage, changes: Sequence[Change]) -> bool:
    """Whether what the stage has is a part of what it is now to make."""
    return bool(changes) and all(c.key in stage.limits and c.is_rise for c in changes)


def _settings(folder: RunFolder, stage: Stage) -> dict[str, Any]:
    return {**stage.settings, "needs": {need: folder.digest(need) for need in stage.needs}}


def _outdated(folder: RunFolder, stage: Stage, extended: Collection[str]) -> str:
    return (
        f"run folder {shown(folder.path)!r}: stage {stage.name} was made from what is now added to"
        f" ({', '.join(sorted(extended))}); --redo makes it again"
    )


def _refusal(folder: RunFolder, stage: Stage, changes: Sequence[Change]) -> str:
    told = "; ".join(map(str, changes[:3]))
    told += f" (and {len(changes) - 3} more)" if changes[3:] else ""
    return (
        f"run folder {shown(folder.path)!r}: stage {stage.name} was made with other settings"
        f" ({told}); take another name, or --redo to make it again"
    )


def _run_stage(folder: RunFolder, stage: Stage, context: StageContext, redo: bool) -> None:
    settings = _settings(folder, stage)
    changes = folder.changes(stage.name, settings)
    extends = _only_raises_limits(stage, changes)
    if changes and not extends and not redo:
        raise RunStateError(_refusal(folder, stage, changes))
    state = folder.state(stage.name)
    retries = context.config.collect.retry_errors and _num_errors(state.summary) > 0
    status = STARTED if extends or retries else state.status
    if changes and not extends:
        folder.set_aside(stage.name, [context.root / output for output in stage.outputs])
        status = None
    if status in FINISHED:
        context.reporter.line(f"[green]done[/]    {stage.name}")
        _tell_unfinished(folder, stage, context.reporter)
        return
    verb = "go on" if status == STARTED else "start"
    context.reporter.stage = stage.name
    context.reporter.line(f"[bold]{verb:<7}[/] [bold]{stage.name}[/]")
    folder.begin(stage.name, settings)
    started = time.monotonic()
    summary = stage.run(context)
    for output in stage.outputs:  # before the record that says that they are there
        push(context.root / output)
    seconds = time.monotonic() - started
    folder.finish(stage.name, settings, summary, seconds)
    word = "[yellow]part[/]" if summary.get(UNFINISHED) else "[green]done[/]"
    context.reporter.line(f"{word}    {stage.name} [dim]in {seconds:.0f} s[/] {_brief(summary)}")
    _tell_unfinished(folder, stage, context.reporter)


def _tell_unfinished(folder: RunFolder, stage: Stage, reporter: Reporter) -> None:
    line = folder.state(stage.name).unfinished
    if line:
        reporter.line(f"  [yellow]{stage.name}: {line}[/]")


def _brief(summary: Any) -> str:
    """The numbers of a summary that fit on a line."""
    parts = [
        f"{key.removeprefix('num_').replace('_', ' ')} {value:,.4g}"
        if isinstance(value, float)
        else f"{key.removeprefix('num_').replace('_', ' ')} {value:,}"
        for key, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "seconds"
    ]
    return "[dim]" + ", ".join(parts[:6]) + "[/]"


def _write_run_files(config: RunConfig) -> None:
    """run.json (settings, versions, revision, machine; one entry per start) and config.yaml."""
    root = config.run_dir
    file = root / "run.json"
    starts = read_json(file)["starts"] if file.is_file() else []
    info = run_info()
    write_json(file, {"name": config.name, "starts": [*starts, info], "config": _plain(config)})
    with atomic(root / "config.yaml") as temp:
        temp.write_text(yaml.safe_dump(_plain(config), sort_keys=False), encoding="utf-8")


def _plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def plan_lines(config: RunConfig) -> list[str]:
    """The resolved plan of a run, for `--dry-run`: stages, resources, tasks, teacher calls."""
    tasks, train, serve, collect = config.tasks, config.train, config.serve, config.collect
    kind = "GPU" if train.use_gpu else "CPU"
    per_episode = config.env.max_steps
    lines = [f"stage     {stage.name}" for stage in build_stages(config)]
    lines += [
        f"tasks     {tasks.num_expert} expert (U1), {tasks.num_collect} collect (U2),"
        f" {tasks.num_eval} evaluate ({' and '.join(tasks.eval_splits)})"
        f" x {len(config.evaluate.seeds)} seeds",
        f"train     {_range(train.least_workers, train.most_workers)} worker(s), one {kind} each,"
        f" {train.strategy},"
        f" {'LoRA rank ' + str(train.lora_rank) if train.lora_rank else 'all weights'}",
        f"held out  {_held_out(config)}",
        f"serve     {serve.engine}, {_range(serve.least_replicas, serve.most_replicas)} replica(s),"
        f" each {serve.gpus_per_replica:g} GPU and {serve.cpus_per_replica:g} CPU",
        f"rollouts  up to {collect.num_actors} actor(s) x {collect.episodes_per_actor} episodes"
        + "".join(f" on {label}: {value}" for label, value in collect.node_labels.items())
        + (f", student {collect.endpoint.model} as it is served" if collect.endpoint else ""),
        f"teacher   {config.teacher.kind} {config.teacher.model}".rstrip()
        + f", at most {tasks.num_collect * per_episode:,} calls"
        f" ({tasks.num_collect} episodes x {per_episode} steps)"
        + "".join(f", budget {n:,} {what}" for what, n in config.teacher.budget.limits.items()),
        f"folder    {shown(config.run_dir)}",
    ]
    return lines


def _held_out(config: RunConfig) -> str:
    """What is validated on, and when."""
    dataset, every = config.dataset, config.train.validate_every
    if not dataset.holds_out:
        return "nothing, no validation (dataset.validation_share or validation_tasks)"
    share = f"{dataset.validation_share:.3g} of the tasks"
    many = share if dataset.validation_share else f"{dataset.validation_tasks} tasks"
    often = f"every {every} steps and " if every else ""
    return f"{many} of U1 and of U2, validated {often}at the end"


def _range(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"
