"""The training set of one model of a run, and its validation set: built, written, counted, shown.

Takes the trajectories of a run folder and a recipe, leaves a folder of examples with the tokenizer
that rendered them. What an example is, is dataset.py's; which tasks are held out, holdout.py's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from step_ray.chat_template import ChatSettings
from step_ray.config import RunConfig
from step_ray.dataset import Sources, build_dataset, build_validation, write_examples
from step_ray.holdout import held_out_tasks, split
from step_ray.mask_view import LEGEND, colour_example, count_lines
from step_ray.progress import Reporter
from step_ray.recipe import Recipe
from step_ray.render import Renderer
from step_ray.store import read_trajectories, write_json
from step_ray.student import load_tokenizer
from step_ray.tasks import read_tasks
from step_ray.train_job import TOKENIZER_FOLDER
from step_ray.types import Trajectory

VALIDATION_FOLDER = "validation"
"""Inside a dataset: the held-out examples."""


def build_arm(
    name: str,
    recipe: Recipe,
    config: RunConfig,
    student: str,
    reporter: Reporter,
    *,
    validated_on: Sequence[str] = ("golden",),
) -> Mapping[str, Any]:
    """Build the examples of an arm, print the counts and the first one.

    Args:
        name: of the arm, or `base`.
        recipe: its data and its mask.
        config: the run.
        student: folder or hub id of the model, whose tokenizer renders.
        reporter: where the counts and the example are printed.
        validated_on: folders of trajectories whose held-out tasks make the validation set.

    Returns:
        The summary, which is written beside the examples too.

    Raises:
        DataError, TemplateError: see `build_dataset`.
    """
    folder = config.run_dir / "datasets" / name
    held = _held_out(config)
    tokenizer = load_tokenizer(student, ChatSettings.of(config.student))
    renderer = Renderer(tokenizer, config.student.max_length)
    sources = _sources(config, recipe, held)
    examples, summary = build_dataset(sources, renderer, recipe, config.dataset, seed=config.seed)
    write_examples(folder, examples)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    record = {**asdict(summary), "share_masked": summary.share_masked}
    if held:
        held_out = [t for source in validated_on for t in split(_read(config, source), held)[1]]
        record |= _write_validation(folder / VALIDATION_FOLDER, held_out, renderer, config)
    write_json(folder / "summary.json", record)
    for line in count_lines(name, summary):
        reporter.line(f"  {line}")
    last = "self_reflected" if recipe.self_reflected else "expert"
    shown = next((e for e in examples if e.source == last), examples[0])
    reporter.line(f"  first {shown.source} example of {name}, {shown.trajectory_id}:")
    reporter.console.print(LEGEND)
    reporter.console.print(colour_example(shown, tokenizer), soft_wrap=False)
    return record


def _read(config: RunConfig, source: str) -> list[Trajectory]:
    return read_trajectories(config.run_dir / "trajectories" / source)


def _held_out(config: RunConfig) -> frozenset[str]:
    """Task ids that no model of the run is trained on."""
    if not config.dataset.holds_out:
        return frozenset()
    files = [config.run_dir / "tasks" / f"{name}.parquet" for name in ("expert", "collect")]
    lists = [[task.task_id for task in read_tasks(file)] for file in files]
    return held_out_tasks(lists, config.dataset, seed=config.seed)


def _sources(config: RunConfig, recipe: Recipe, held: frozenset[str]) -> Sources:
    """What an arm chooses from, without the held-out tasks."""

    def training(source: str) -> list[Trajectory]:
        return split(_read(config, source), held)[0]

    needs_reflected = recipe.self_reflected or recipe.match != "none"
    return Sources(
        golden=training("golden"),
        golden_collect=training("golden_collect") if recipe.golden_collect else (),
        self_reflected=training("collect") if needs_reflected else (),
        own_success=training("own") if recipe.own_success else (),
    )


def _write_validation(
    folder: Path, held_out: Sequence[Trajectory], renderer: Renderer, config: RunConfig
) -> dict[str, Any]:
    """Write the held-out examples, the same for all arms; gives their counts."""
    examples, summary = build_validation(held_out, renderer, config.dataset)
    write_examples(folder, examples)
    return {
        "num_validation": summary.num_examples,
        "num_validation_tokens": summary.num_trained_tokens,
        "num_validation_error_tokens": summary.num_masked_tokens,
        "validation_dropped": dict(summary.dropped),
    }
