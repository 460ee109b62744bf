"""The stages that make a model of a run: its dataset and its training.

Takes a `RunConfig` and the name of the base agent or of an arm, gives two `Stage`s. The examples
are dataset.py's, the training is train.py's; here they meet the folders of a run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from step_ray.config import BASE, RunConfig, TrainConfig
from step_ray.stages.base import Stage, StageContext
from step_ray.storage.places import place_of
from step_ray.training.config import TRAIN_SPEED_ONLY
from step_ray.training.holdout import held_out_lines, held_out_tasks, of_tasks
from step_ray.training.recipe import Recipe
from step_ray.types import Trajectory

VALIDATION = "validation"
"""Folder of the held-out examples inside a dataset."""


def model_stages(config: RunConfig, name: str) -> list[Stage]:
    """Dataset and training of the base agent or of one arm."""
    recipe = recipe_of(config, name)
    start = ("student",) if config.student.init == "scratch" else ()
    collected = ("collect",) if name != BASE and _reads_collection(config, recipe) else ()
    own = ("own",) if recipe.own_success else ()
    student = config.student.model_dump(exclude={"scratch"})
    from_base = ("train:base",) if recipe.init == "base_agent" else ()
    train = train_config(config, name).model_dump(exclude=set(TRAIN_SPEED_ONLY))
    return [
        Stage(
            name=f"dataset:{name}",
            needs=("expert", *collected, *own, *start),
            settings={
                "recipe": recipe.model_dump(exclude={"policy"}),
                "dataset": config.dataset.model_dump(),
                "student": student,
                "seed": config.seed,
            },
            outputs=(f"datasets/{name}",),
            run=lambda context: _build_dataset(context, name),
        ),
        Stage(
            name=f"train:{name}",
            needs=(f"dataset:{name}", *from_base),
            settings={"train": train, "student": student, "seed": config.seed},
            outputs=(f"models/{name}", f"train/{name}"),
            run=lambda context: _fit(context, name),
        ),
    ]


def needs_collection(config: RunConfig) -> bool:
    """Whether anything is made of self-reflected trajectories; without arms, they are the aim."""
    arms = config.arms.values()
    return not arms or any(_reads_collection(config, arm) for arm in arms)


def _reads_collection(config: RunConfig, recipe: Recipe) -> bool:
    """Whether an arm trains on self-reflected trajectories, is matched to them, or validated."""
    has_some = any(arm.self_reflected for arm in config.arms.values())
    is_validated = config.dataset.holds_out and has_some
    return recipe.self_reflected or recipe.match != "none" or is_validated


def recipe_of(config: RunConfig, name: str) -> Recipe:
    """What the base agent or an arm is trained on."""
    return Recipe(init="student") if name == BASE else config.arms[name]


def train_config(config: RunConfig, name: str) -> TrainConfig:
    """The training settings of the base agent or of an arm."""
    return config.train if name == BASE else config.arm_train()


def _build_dataset(context: StageContext, name: str) -> Mapping[str, Any]:
    from step_ray.dataset import build_dataset, write_examples
    from step_ray.render import Renderer
    from step_ray.store import write_json
    from step_ray.training.chat_template import ChatSettings
    from step_ray.training.job import TOKENIZER_FOLDER
    from step_ray.training.mask_view import LEGEND, colour_example, count_lines
    from step_ray.training.student import load_tokenizer

    config, recipe = context.config, recipe_of(context.config, name)
    tokenizer = load_tokenizer(context.student_source(), ChatSettings.of(config.student))
    renderer = Renderer(tokenizer, config.student.max_length)
    held = _held_out(context)
    sources = _sources(context.root, recipe, held)
    examples, summary = build_dataset(sources, renderer, recipe, config.dataset, seed=config.seed)
    folder = context.root / "datasets" / name
    write_examples(folder, examples)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    record = {**asdict(summary), "share_masked": summary.share_masked}
    if held:
        record |= _write_validation(context, name, renderer, held)
    write_json(folder / "summary.json", record)
    for line in [*count_lines(name, summary), *held_out_lines(name, record)]:
        context.reporter.line(f"  {line}")
    last = "self_reflected" if recipe.self_reflected else "expert"
    shown = next((e for e in examples if e.source == last), examples[0])
    context.reporter.line(f"  first {shown.source} example of {name}, {shown.trajectory_id}:")
    context.reporter.console.print(LEGEND)
    context.reporter.console.print(colour_example(shown, tokenizer), soft_wrap=False)
    return record


def _held_out(context: StageContext) -> frozenset[str]:
    """Task ids that no model of the run is trained on."""
    from step_ray.tasks import read_tasks

    config = context.config
    if not config.dataset.holds_out:
        return frozenset()
    folder = context.root / "tasks"
    lists = [
        [t.task_id for t in read_tasks(folder / f"{n}.parquet")] for n in ("expert", "collect")
    ]
    return held_out_tasks(lists, config.dataset, seed=config.seed)


def _read(root: Path, folder: str, held: frozenset[str], *, is_held: bool) -> Iterator[Trajectory]:
    from step_ray.store import iter_trajectories

    return of_tasks(iter_trajectories(root / "trajectories" / folder), held, is_held=is_held)


def _sources(root: Path, recipe: Recipe, held: frozenset[str]) -> Any:
    """What an arm chooses from, without the held-out tasks."""
    from step_ray.dataset import Sources

    def training(folder: str) -> Iterator[Trajectory]:
        return _read(root, folder, held, is_held=False)

    needs_reflected = recipe.self_reflected or recipe.match != "none"
    return Sources(
        golden=training("golden"),
        golden_collect=training("golden_collect") if recipe.golden_collect else (),
        self_reflected=training("collect") if needs_reflected else (),
        own_success=list(training("own")) if recipe.own_success else (),
    )


def _write_validation(
    context: StageContext, name: str, renderer: Any, held: frozenset[str]
) -> dict[str, Any]:
    """The held-out examples, the same for all arms; gives their counts."""
    from step_ray.dataset import build_validation, write_examples

    collected = name != BASE and _reads_collection(context.config, recipe_of(context.config, name))
    played = ["golden", "collect"] if collected else ["golden"]
    held_out = chain.from_iterable(
        _read(context.root, folder, held, is_held=True) for folder in played
    )
    examples, summary = build_validation(held_out, renderer, context.config.dataset)
    write_examples(context.root / "datasets" / name / VALIDATION, examples)
    return {
        "num_validation": summary.num_examples,
        "num_validation_tokens": summary.num_trained_tokens,
        "num_validation_error_tokens": summary.num_masked_tokens,
        "validation_dropped": dict(summary.dropped),
    }


def _fit(context: StageContext, name: str) -> Mapping[str, Any]:
    from step_ray.train import train

    config = context.config
    if config.serve.gpus_per_replica:
        context.stop_serving()
    root = context.root.resolve()
    examples = root / "datasets" / name
    settings = train_config(config, name)
    from_base = recipe_of(config, name).init == "base_agent"
    with context.reporter.counter(f"train {name}") as counter:
        result = train(
            settings,
            examples_dir=examples,
            validation_dir=examples / VALIDATION if config.dataset.holds_out else None,
            init=place_of(root / "models" / BASE) if from_base else context.student_source(),
            dtype=config.student.dtype,
            output_dir=root / "models" / name,
            work_dir=root / "train" / name,
            seed=config.seed,
            name=name,
            on_progress=lambda m: counter.update(
                m["step"],
                f"loss {m['loss']:.3f}, {m['tokens_per_s']:,.0f} tokens/s",
                m["num_steps"],
            ),
            on_start=lambda m: context.reporter.line(f"train {name}: {start_line(m)}"),
        )
    return asdict(result)


def start_line(start: Mapping[str, Any]) -> str:
    """What is said of a line of starts.jsonl: from where, with how many workers, how."""
    workers = f"{start['workers']} worker(s)"
    begun = f"goes on after step {start['step']} with {workers}" if start["step"] else workers
    return f"{begun}; {start['layout']}"
