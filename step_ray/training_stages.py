"""The stages that make a model of a run: its dataset and its training.

Takes a `RunConfig` and the name of the base agent or of an arm, gives two `Stage`s. The examples
are dataset.py's, the training is train.py's; here they meet the folders of a run.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from step_ray.config import BASE, RunConfig, TrainConfig
from step_ray.recipe import Recipe
from step_ray.stage import Stage, StageContext
from step_ray.train_config import TRAIN_SPEED_ONLY


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
    from step_ray.arm_data import build_arm

    config, recipe = context.config, recipe_of(context.config, name)
    collected = name != BASE and _reads_collection(config, recipe)
    return build_arm(
        name,
        recipe,
        config,
        context.student_source(),
        context.reporter,
        validated_on=("golden", "collect") if collected else ("golden",),
    )


def _fit(context: StageContext, name: str) -> Mapping[str, Any]:
    from step_ray.arm_data import VALIDATION_FOLDER
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
            validation_dir=examples / VALIDATION_FOLDER if config.dataset.holds_out else None,
            init=str(root / "models" / BASE) if from_base else context.student_source(),
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
            on_start=lambda m: context.reporter.line(f"train {name}: {m['layout']}"),
        )
    return asdict(result)
