"""The `step-ray` command: thin; it reads flags, calls one function and sets the exit code.

Exit codes: 0 done, 1 something failed while running, 2 the input is wrong.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from step_ray import __version__
from step_ray.config import RunConfig, load_config
from step_ray.data.commands import app as data_app
from step_ray.data.commands import replay
from step_ray.errors import ConfigError, StepRayError

app = typer.Typer(
    help="STeP: LLM agents trained on self-reflected trajectories with partial masking, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_app, name="data")

INTERRUPTED = 130
"""Exit code that typer gives to Ctrl-C."""

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see jobs/configs")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="override a key; repeatable")
]
Redo = Annotated[
    bool, typer.Option("--redo", help="make stages again whose settings changed (old: replaced/)")
]
Arm = Annotated[str, typer.Option("--arm", help="`base` or the name of an arm")]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    redo: Redo = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="print the resolved plan and what is missing; do nothing"),
    ] = False,
) -> None:
    """The whole line: every stage in order; done ones are skipped, a killed one goes on."""
    resolved = load_config(config, overrides or ())
    if dry_run:
        _print_plan(resolved)
        return
    _stages(resolved, None, redo)


def _print_plan(config: RunConfig) -> None:
    import yaml

    from step_ray.pipeline import plan_lines, preflight
    from step_ray.stages import build_stages

    out = Console(highlight=False)
    out.print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), markup=False)
    for line in plan_lines(config):
        out.print(line, soft_wrap=True, markup=False)
    for check in preflight(config, [stage.name for stage in build_stages(config)]):
        state = "ready" if check.fault is None else "MISSING"
        out.print(f"{state:<9} {check.fault or check.what}", soft_wrap=True, markup=False)


@app.command()
def expert(config: ConfigPath, overrides: Overrides = None, redo: Redo = False) -> None:
    """Deal out the tasks and play the golden trajectories."""
    _stages(load_config(config, overrides or ()), ("tasks", "expert"), redo)


@app.command()
def dataset(
    config: ConfigPath, arm: Arm = "base", overrides: Overrides = None, redo: Redo = False
) -> None:
    """Build the training examples of one model."""
    _stages(load_config(config, overrides or ()), ("student", f"dataset:{arm}"), redo, arm)


@app.command()
def train(
    config: ConfigPath, arm: Arm = "base", overrides: Overrides = None, redo: Redo = False
) -> None:
    """Train one model on its examples."""
    _stages(load_config(config, overrides or ()), (f"train:{arm}",), redo, arm)


@app.command()
def collect(config: ConfigPath, overrides: Overrides = None, redo: Redo = False) -> None:
    """Let the base agent act under the teacher."""
    _stages(load_config(config, overrides or ()), ("collect",), redo)


@app.command()
def evaluate(
    config: ConfigPath, arm: Arm = "step", overrides: Overrides = None, redo: Redo = False
) -> None:
    """Serve one model and let it play the held-out tasks."""
    _stages(load_config(config, overrides or ()), (f"evaluate:{arm}",), redo, arm)


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write the report from what the run folder has; what is missing is shown as not run."""
    from step_ray.summary import write_run_report

    resolved = load_config(config, overrides or ())
    if not (resolved.run_dir / "run.json").is_file():
        raise ConfigError(
            f"name: there is no run in {str(resolved.run_dir)!r}; start it with `step-ray run`"
        )
    print(write_run_report(resolved, Console(highlight=False)))


@app.command()
def serve(
    config: ConfigPath,
    arm: Arm = "step",
    overrides: Overrides = None,
    model_dir: Annotated[
        str | None, typer.Option("--model-dir", help="serve this model folder instead of an arm")
    ] = None,
) -> None:
    """Serve a model with the OpenAI chat API until Ctrl-C."""
    from step_ray.serving import serve_forever

    resolved = load_config(config, overrides or ())
    folder = model_dir or str((resolved.run_dir / "models" / arm).resolve())
    serve_forever(resolved, folder, arm if model_dir is None else Path(model_dir).name)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="folder of trajectories or of training examples")],
    index: Annotated[int, typer.Option("--index", "-n", help="which one, from 0")] = 0,
    task: Annotated[str, typer.Option("--id", help="the first whose id contains this text")] = "",
    model: Annotated[
        str, typer.Option("--model", help="model folder whose tokenizer reads the examples")
    ] = "",
    mask: Annotated[
        bool, typer.Option("--mask", help="a micro-batch as training sees it, not one example")
    ] = False,
) -> None:
    """Show a trajectory, a training example with its mask, or a real micro-batch, in colour."""
    from step_ray.viewer import Choice, show_path

    choice = Choice(index=index, text=task, model=model, batches=mask)
    show_path(path, choice, Console(highlight=False))


@app.command()
def play(
    env: Annotated[str, typer.Argument(help="environment: alfworld or webshop")],
    game: Annotated[
        str,
        typer.Argument(help="game.tw-pddl, its folder, or a folder of WebShop's files; none: new"),
    ] = "",
    seed: Annotated[int, typer.Option("--seed", help="which new game")] = 0,
    engine: Annotated[str, typer.Option("--engine", help="alfworld: native, textworld")] = "native",
) -> None:
    """Play a game by hand, with valid actions, hints and undo."""
    import tempfile

    from step_ray.envs import make_env, make_expert
    from step_ray.play import Session, new_task
    from step_ray.play import play as play_session

    with tempfile.TemporaryDirectory() as folder:
        task = new_task(env, game, Path(folder), seed)
        options = {"engine": engine} if env == "alfworld" else {}
        session = Session(make_env(env, **options), task, make_expert(task))
        play_session(session, _typed_lines(), print)


app.command()(replay)


def _typed_lines() -> Iterator[str]:
    """What is typed, line by line, until the input ends."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _stages(
    config: RunConfig, only: Sequence[str] | None, redo: bool, arm: str | None = None
) -> None:
    from step_ray.pipeline import run as run_stages
    from step_ray.progress import Reporter

    if arm is not None and arm != "base" and arm not in config.arms:
        raise ConfigError(f"--arm: {arm!r} is not an arm; use one of {['base', *config.arms]}")
    run_stages(config, Reporter(), only=only, redo=redo)


def run_as_job(command: str) -> None:
    """What the scripts in jobs/ call: `--config FILE`, then the command's own flags."""
    parser = argparse.ArgumentParser(description=f"step-ray {command} on the cluster of this job")
    parser.add_argument("--config", required=True, help="YAML file, see jobs/configs")
    known, rest = parser.parse_known_args()
    sys.argv = ["step-ray", command, known.config, "--set", "ray.address=auto", *rest]
    main()


def main() -> None:
    """Entry point: errors of step_ray become one line on stderr and an exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        app(standalone_mode=True)
    except StepRayError as exc:
        print(f"step-ray: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
    except SystemExit as exc:
        if exc.code == INTERRUPTED:
            print("step-ray: interrupted; the same command goes on from here", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
