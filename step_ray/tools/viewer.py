"""`step-ray show`: picks one trajectory, training example or forward pass and prints it.

Takes a path and a choice, prints in colour. The layout of a trajectory is show.py's, that of a
masked example is mask_view.py's, that of a forward pass is batch_view.py's.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
from rich.console import Console
from rich.text import Text

from step_ray.config import BASE, TrainConfig, parse_config
from step_ray.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What of a folder is shown."""

    index: int = 0
    """Which one of those that match, from 0."""
    text: str = ""
    """Part of the trajectory id."""
    model: str = ""
    """Model folder whose tokenizer reads the examples; empty: the one that is kept with them."""
    batches: bool = False
    """Forward passes instead of examples."""


def show_path(path: Path, choice: Choice, console: Console) -> None:
    """Print one record of a folder.

    Raises:
        DataError: nothing there, or no record with that index or id.
    """
    if choice.batches:
        _show_batch(path, choice, console)
    elif (path / "examples.parquet").is_file():
        _show_example(path, choice, console)
    else:
        _show_trajectory(path, choice, console)


def _show_trajectory(path: Path, choice: Choice, console: Console) -> None:
    from step_ray.store import iter_trajectories, trajectory_ids
    from step_ray.tools.show import show_trajectory

    ids = trajectory_ids(path)
    found = ids.filter(pc.match_substring(ids, choice.text))
    _check(len(found), len(ids), choice.index, path)
    show_trajectory(next(iter_trajectories(path, found[choice.index : choice.index + 1])), console)


def _show_example(path: Path, choice: Choice, console: Console) -> None:
    from step_ray.dataset import read_examples
    from step_ray.training.mask_view import LEGEND, colour_example
    from step_ray.training.student import load_tokenizer

    examples = read_examples(path)
    found = [e for e in examples if choice.text in e.trajectory_id]
    _check(len(found), len(examples), choice.index, path)
    example, tokenizer = found[choice.index], load_tokenizer(_tokenizer(path, choice.model))
    console.print(Text(f"{example.trajectory_id} ({example.source})", "bold"))
    console.print(LEGEND)
    console.print(colour_example(example, tokenizer))
    trained, masked, total = sum(example.loss_mask), sum(example.error_mask), len(example.input_ids)
    console.print(Text(f"{trained} of {total} tokens trained, {masked} masked", "dim"))


def _show_batch(path: Path, choice: Choice, console: Console) -> None:
    """A forward pass of the first epoch, by the settings of the run that the folder is in."""
    from step_ray.dataset import read_examples
    from step_ray.training.batch_view import first_epoch, view_pass
    from step_ray.training.batching import load_examples
    from step_ray.training.mask_view import LEGEND
    from step_ray.training.student import load_tokenizer

    if choice.text:
        raise DataError("--id: a forward pass holds several examples; choose it by --index")
    if not (path / "examples.parquet").is_file():
        raise DataError(f"--mask: {str(path)!r} holds no training examples; name datasets/ARM")
    examples = load_examples(path)
    config, seed = _training(path)
    packed, why = _layout(path, config)
    passes = first_epoch(examples, config, seed=seed, packed=packed)
    _check(len(passes), len(passes), choice.index, path)
    tokenizer = load_tokenizer(_tokenizer(path, choice.model))
    console.print(
        Text(f"forward pass {choice.index} of {len(passes)} in the first epoch; {why}", "dim")
    )
    console.print(LEGEND)
    one, rows = passes[choice.index], read_examples(path)
    for text in view_pass(one, examples, rows, tokenizer, packed=packed):
        console.print(text)


def _tokenizer(path: Path, model: str) -> str:
    """The tokenizer that is kept with the examples, or else that of a model of the run.

    Raises:
        DataError: there is none.
    """
    from step_ray.training.job import TOKENIZER_FOLDER

    models = path.resolve().parent.parent / "models"
    known = [path / TOKENIZER_FOLDER, models / path.resolve().name, models / BASE]
    found = model or next((str(folder) for folder in known if folder.is_dir()), "")
    if not found:
        raise DataError(f"show: no tokenizer is kept with {str(path)!r}; name one with --model")
    return found


def _training(path: Path) -> tuple[TrainConfig, int]:
    """Settings and seed of the training on a folder `<run>/datasets/<arm>`; else the defaults."""
    run = path.resolve().parent.parent / "run.json"
    if not run.is_file():
        return TrainConfig(), 0
    config = parse_config(json.loads(run.read_text(encoding="utf-8"))["config"])
    is_base = path.resolve().name == BASE
    return config.train if is_base else config.arm_train(), config.seed


def _layout(path: Path, config: TrainConfig) -> tuple[bool, str]:
    """Whether rows are packed, and how that is known."""
    if config.packing != "auto":
        return config.packing == "packed", f"train.packing: {config.packing}"
    starts = path.resolve().parent.parent / "train" / path.resolve().name / "starts.jsonl"
    lines = starts.read_text(encoding="utf-8").splitlines() if starts.is_file() else []
    layout = str(json.loads(lines[-1]).get("layout", "")) if lines else ""
    if not layout:
        return True, "train.packing: auto, not trained yet, shown packed"
    return layout.startswith("batches are packed"), f"as trained: {layout}"


def _check(num_found: int, num_all: int, index: int, path: Path) -> None:
    if not num_all:
        raise DataError(f"show: {str(path)!r} holds no trajectories and no examples")
    if not 0 <= index < num_found:
        raise DataError(f"show: --index {index}, but {num_found} of {num_all} records match")
