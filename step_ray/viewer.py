"""`step-ray show`: picks one trajectory or training example from a folder and prints it.

Takes a path and a choice, prints in colour. The layout of a trajectory is show.py's, that of a
masked example is dataset.py's.
"""

from pathlib import Path

from rich.console import Console

from step_ray.errors import DataError


def show_path(path: Path, index: int, text: str, model: str, console: Console) -> None:
    """Print one record of a folder.

    Raises:
        DataError: nothing there, or no record with that index or id.
    """
    if (path / "examples.parquet").is_file():
        _show_example(path, index, text, model, console)
    else:
        _show_trajectory(path, index, text, console)


def _show_trajectory(path: Path, index: int, text: str, console: Console) -> None:
    from step_ray.show import show_trajectory
    from step_ray.store import read_trajectories

    trajectories = read_trajectories(path)
    found = [t for t in trajectories if text in t.trajectory_id]
    _check(len(found), len(trajectories), index, path)
    show_trajectory(found[index], console)


def _show_example(path: Path, index: int, text: str, model: str, console: Console) -> None:
    from step_ray.dataset import read_examples
    from step_ray.mask_view import colour_example
    from step_ray.student import load_tokenizer

    examples = read_examples(path)
    found = [e for e in examples if text in e.trajectory_id]
    _check(len(found), len(examples), index, path)
    # a run keeps the model trained on datasets/<arm> in models/<arm>
    source = model or str(path.resolve().parent.parent / "models" / path.resolve().name)
    example = found[index]
    console.print(f"[bold]{example.trajectory_id}[/] ({example.source})")
    console.print(colour_example(example, load_tokenizer(source)))
    trained, total = sum(example.loss_mask), len(example.loss_mask)
    console.print(f"[dim]{trained} of {total} tokens trained[/]")


def _check(num_found: int, num_all: int, index: int, path: Path) -> None:
    if not num_all:
        raise DataError(f"show: {str(path)!r} holds no trajectories and no examples")
    if not 0 <= index < num_found:
        raise DataError(f"show: --index {index}, but {num_found} of {num_all} records match")
