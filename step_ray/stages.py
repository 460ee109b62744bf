"""The stages of a run: what each one needs, which settings define it, and what it does.

Takes a `RunConfig`, gives the ordered list of `Stage`s. A stage reads and writes files under the
run folder only; whether it has to run at all is pipeline.py's business.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from step_ray.config import BASE, RunConfig
from step_ray.progress import Reporter
from step_ray.teacher_config import TEACHER_ADDRESS
from step_ray.types import Source, Trajectory

SPEED_ONLY = {
    *("num_actors", "min_actors", "node_labels", "episodes_per_actor", "cpus_per_actor"),
    *("rows_per_shard", "max_error_share", "max_errors", "errors_judged_after", "retry_errors"),
    *("max_starts", "try_timeout_s"),
}
"""Settings of `collect` that change how fast and with how many faults, not what."""
TRAIN_SPEED_ONLY = {"cpus_per_worker", "checkpoint_every", "max_failures"}
"""The same of `train`; not the number of workers: sums in another order differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the line."""

    name: str
    needs: tuple[str, ...]
    settings: Mapping[str, Any]
    """What defines the outcome; a change means that the outcome is another one."""
    outputs: tuple[str, ...]
    """Paths under the run folder that the stage owns."""
    run: Callable[["StageContext"], Mapping[str, Any]]
    """Does the work, gives the summary."""
    limits: frozenset[str] = frozenset()
    """Settings that, when raised, only add to the outcome: the stage goes on from what it has."""


class StageContext:
    """What a running stage works with; it keeps one served model between stages."""

    def __init__(self, config: RunConfig, reporter: Reporter) -> None:
        self.config = config
        self.reporter = reporter
        self.root = config.run_dir
        self._served: Any = None

    def student_source(self) -> str:
        """The model folder or hub id that training starts from."""
        from step_ray.student import resolve_init

        if self.config.student.init == "scratch":
            return str((self.root / "models" / "student").resolve())
        return resolve_init(self.config.student.init)

    def serve(self, model: str) -> Any:
        """Serve a trained model, replacing the one that was served before."""
        from step_ray.serve import deploy

        if self._served is None or self._served.model != model:
            self.reporter.line(f"  serving [cyan]{model}[/]")
            self._served = deploy(
                str((self.root / "models" / model).resolve()),
                model,
                self.config.serve,
                max_length=self.config.student.max_length,
                dtype=self.config.student.dtype,
            )
            self.reporter.line(f"  {model} answers at {self._served.base_url}")
        return self._served

    def stop_serving(self) -> None:
        """Free the served model's devices."""
        if self._served is not None:
            self._served.close()
            self._served = None


def build_stages(config: RunConfig) -> list[Stage]:
    """The stages of a run in the order in which they are done."""
    stages = [_tasks(config), _expert(config)]
    if config.student.init == "scratch":
        stages.append(_student(config))
    stages += [*_train_model(config, BASE), _collect(config)]
    for arm in config.arms:
        stages += _train_model(config, arm)
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
        from step_ray.listplay import play_list
        from step_ray.runner import EpisodePlan

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
        from step_ray.student import new_model, save_student, train_tokenizer

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


def _train_model(config: RunConfig, name: str) -> list[Stage]:
    """Dataset and training of the base agent or of one arm."""
    from step_ray.config import Recipe

    is_base = name == BASE
    recipe = Recipe(init="student") if is_base else config.arms[name]
    train = config.train if is_base else config.arm_train()
    student = config.student.model_dump(include={"init", "max_length", "dtype"})
    start = ("student",) if config.student.init == "scratch" else ()
    needs = ("expert", *start) if is_base else ("expert", "collect", *start)

    def build(context: StageContext) -> Mapping[str, Any]:
        return _build_dataset(context, name, recipe)

    def fit(context: StageContext) -> Mapping[str, Any]:
        return _fit(context, name, recipe.init == "base_agent")

    from_base = ("train:base",) if recipe.init == "base_agent" else ()
    return [
        Stage(
            name=f"dataset:{name}",
            needs=needs,
            settings={
                "recipe": recipe.model_dump(),
                "dataset": config.dataset.model_dump(),
                "student": student,
                "seed": config.seed,
            },
            outputs=(f"datasets/{name}",),
            run=build,
        ),
        Stage(
            name=f"train:{name}",
            needs=(f"dataset:{name}", *from_base),
            settings={
                "train": train.model_dump(exclude=TRAIN_SPEED_ONLY),
                "student": student,
                "seed": config.seed,
            },
            outputs=(f"models/{name}", f"train/{name}"),
            run=fit,
        ),
    ]


def _build_dataset(context: StageContext, name: str, recipe: Any) -> Mapping[str, Any]:
    from step_ray.dataset import Sources, build_dataset, colour_example, write_examples
    from step_ray.render import Renderer
    from step_ray.store import read_trajectories, write_json
    from step_ray.student import load_tokenizer

    def read(folder: str) -> list[Trajectory]:
        return read_trajectories(context.root / "trajectories" / folder)

    needs_reflected = recipe.self_reflected or recipe.match != "none"
    sources = Sources(
        golden=read("golden"),
        golden_collect=read("golden_collect") if recipe.golden_collect else (),
        self_reflected=read("collect") if needs_reflected else (),
    )
    tokenizer = load_tokenizer(context.student_source())
    renderer = Renderer(tokenizer, context.config.student.max_length)
    examples, summary = build_dataset(
        sources, renderer, recipe, context.config.dataset, seed=context.config.seed
    )
    folder = context.root / "datasets" / name
    write_examples(folder, examples)
    record = {**asdict(summary), "share_masked": summary.share_masked}
    write_json(folder / "summary.json", record)
    last = "self_reflected" if recipe.self_reflected else "expert"
    shown = next((e for e in examples if e.source == last), examples[0])
    context.reporter.line(f"  first {last} example of {name}; green is trained, red is masked:")
    context.reporter.console.print(colour_example(shown, tokenizer), soft_wrap=False)
    return record


def _fit(context: StageContext, name: str, from_base: bool) -> Mapping[str, Any]:
    from step_ray.train import train

    config = context.config
    if config.serve.gpus_per_replica:
        context.stop_serving()
    root = context.root.resolve()
    settings = config.train if name == BASE else config.arm_train()
    with context.reporter.counter(f"train {name}") as counter:
        result = train(
            settings,
            examples_dir=root / "datasets" / name,
            init=str(root / "models" / BASE) if from_base else context.student_source(),
            dtype=config.student.dtype,
            output_dir=root / "models" / name,
            work_dir=root / "train" / name,
            seed=config.seed,
            name=name,
            cpus_per_worker=settings.cpus_per_worker,
            on_progress=lambda m: counter.update(
                m["step"],
                f"loss {m['loss']:.3f}, {m['tokens_per_s']:,.0f} tokens/s",
                m["num_steps"],
            ),
        )
    return asdict(result)


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
        from step_ray.listplay import play_list
        from step_ray.runner import EpisodePlan
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
    from step_ray.runner import Address

    given, serve = context.config.collect.endpoint, context.config.serve
    if given is not None:
        return Address(base_url=given.base_url, model=given.model, api_key_env=given.api_key_env)
    served = context.serve(BASE)
    return Address(base_url=served.base_url, model=BASE, api_key_env=serve.api_key_env)


def _evaluate(config: RunConfig, model: str) -> Stage:
    settings = {
        **_episode_settings(config),
        "evaluate": config.evaluate.model_dump(exclude={"concurrency", "confidence"}),
        "max_new_tokens": config.collect.max_new_tokens,
        "max_format_errors": config.collect.max_format_errors,
        "before_execution": config.teacher.when == "before_execution",
    }

    def run(context: StageContext) -> Mapping[str, Any]:
        from step_ray.evaluate import evaluate
        from step_ray.listplay import shown_episodes

        endpoint = context.serve(model)
        total = config.tasks.num_eval * len(config.evaluate.seeds)
        with shown_episodes(context.reporter, f"evaluate {model}", total) as shown:
            report = evaluate(
                config,
                model=model,
                base_url=endpoint.base_url,
                tasks_file=context.root / "tasks/evaluate.parquet",
                out_dir=context.root / "evaluate" / model,
                on_episode=shown.add,
                on_begin=shown.begin,
            )
        return asdict(report)

    return Stage(
        name=f"evaluate:{model}",
        needs=("tasks", f"train:{model}"),
        settings=settings,
        outputs=(f"evaluate/{model}",),
        run=run,
    )


def _report(config: RunConfig, needs: list[str]) -> Stage:
    def run(context: StageContext) -> Mapping[str, Any]:
        from step_ray.summary import write_run_report

        return {"file": str(write_run_report(context.config, context.reporter.console))}

    return Stage(
        name="report",
        needs=tuple(needs),
        settings={"confidence": config.evaluate.confidence},
        outputs=("report",),
        run=run,
    )
