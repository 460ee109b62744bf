"""The training set of one model of a run: built, written, counted and shown.

Takes the trajectories of a run folder and a recipe, leaves a folder of examples with the tokenizer
that rendered them. What an example is, is dataset.py's.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from step_ray.batching import TOKENIZER_FOLDER
from step_ray.chat_template import ChatSettings
from step_ray.config import RunConfig
from step_ray.dataset import Sources, build_dataset, write_examples
from step_ray.mask_view import LEGEND, colour_example, count_lines
from step_ray.progress import Reporter
from step_ray.recipe import Recipe
from step_ray.render import Renderer
from step_ray.store import read_trajectories, write_json
from step_ray.student import load_tokenizer
from step_ray.types import Trajectory


def build_arm(
    name: str, recipe: Recipe, config: RunConfig, student: str, reporter: Reporter
) -> Mapping[str, Any]:
    """Build the examples of an arm, print the counts and the first one.

    Args:
        name: of the arm, or `base`.
        recipe: its data and its mask.
        config: the run.
        student: folder or hub id of the model, whose tokenizer renders.
        reporter: where the counts and the example are printed.

    Returns:
        The summary, which is written beside the examples too.

    Raises:
        DataError, TemplateError: see `build_dataset`.
    """
    root = config.run_dir

    def read(folder: str) -> list[Trajectory]:
        return read_trajectories(root / "trajectories" / folder)

    needs_reflected = recipe.self_reflected or recipe.match != "none"
    sources = Sources(
        golden=read("golden"),
        golden_collect=read("golden_collect") if recipe.golden_collect else (),
        self_reflected=read("collect") if needs_reflected else (),
    )
    tokenizer = load_tokenizer(student, ChatSettings.of(config.student))
    renderer = Renderer(tokenizer, config.student.max_length)
    examples, summary = build_dataset(sources, renderer, recipe, config.dataset, seed=config.seed)
    folder = root / "datasets" / name
    write_examples(folder, examples)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    record = {**asdict(summary), "share_masked": summary.share_masked}
    write_json(folder / "summary.json", record)
    for line in count_lines(name, summary):
        reporter.line(f"  {line}")
    last = "self_reflected" if recipe.self_reflected else "expert"
    shown = next((e for e in examples if e.source == last), examples[0])
    reporter.line(f"  first {last} example of {name}, {shown.trajectory_id}:")
    reporter.console.print(LEGEND)
    reporter.console.print(colour_example(shown, tokenizer), soft_wrap=False)
    return record
