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
from step_ray.cluster.logs import reporter_for, tell_error
from step_ray.config import RunConfig, load_config
from step_ray.data.commands import app as data_app
from step_ray.data.commands import replay
from step_ray.errors import ConfigError, StepRayError
from step_ray.storage.mirror import given_path, given_run
from step_ray.storage.places import is_url, place_of

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
Assignments = Annotated[
    list[str] | None, typer.Argument(metavar="[A.B=C]...", help="overrides, as with --set")
]
Redo = Annotated[
    bool, typer.Option("--redo", help="make stages again whose settings changed (old: replaced/)")
]
RetryErrors = Annotated[
    bool, typer.Option("--retry-errors", help="play episodes that ended by an error again")
]
Arm = Annotated[str, typer.Option("--arm", help="`base` or the name of an arm")]


@app.command()
def run(
    config: ConfigPath,
    assignments: Assignments = None,
    overrides: Overrides = None,
    redo: Redo = False,
    retry_errors: RetryErrors = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="print the resolved plan and what is missing; do nothing"),
    ] = False,
) -> None:
    """The whole line: every stage in order; done ones are skipped, a killed one goes on."""
    resolved = _load(config, overrides, assignments, retry_errors)
    if dry_run:
        _print_plan(resolved)
        return
    _stages(resolved, None, redo)


def _print_plan(config: RunConfig) -> None:
    import yaml

    from step_ray.pipeline import plan_lines, preflight
    from step_ray.stages.line import build_stages

    out = Console(highlight=False)
    out.print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), markup=False)
    for line in plan_lines(config):
        out.print(line, soft_wrap=True, markup=False)
    checks = preflight(config, [stage.name for stage in build_stages(config)])
    for check in checks:
        state = "ready" if check.fault is None else "MISSING"
        out.print(f"{state:<9} {check.fault or check.what}", soft_wrap=True, markup=False)
    if missing := sum(check.fault is not None for check in checks):
        raise ConfigError(f"--dry-run: {missing} of {len(checks)} checks failed, see MISSING above")


@app.command()
def expert(
    config: ConfigPath,
    assignments: Assignments = None,
    overrides: Overrides = None,
    redo: Redo = False,
    retry_errors: RetryErrors = False,
) -> None:
    """Deal out the tasks and play the golden trajectories."""
    _stages(_load(config, overrides, assignments, retry_errors), ("tasks", "expert"), redo)


@app.command()
def dataset(
    config: ConfigPath,
    assignments: Assignments = None,
    arm: Arm = "base",
    overrides: Overrides = None,
    redo: Redo = False,
) -> None:
    """Build the training examples of one model."""
    _stages(_load(config, overrides, assignments), ("student", f"dataset:{arm}"), redo, arm)


@app.command()
def train(
    config: ConfigPath,
    assignments: Assignments = None,
    arm: Arm = "base",
    overrides: Overrides = None,
    redo: Redo = False,
) -> None:
    """Train one model on its examples."""
    _stages(_load(config, overrides, assignments), (f"train:{arm}",), redo, arm)


@app.command()
def collect(
    config: ConfigPath,
    assignments: Assignments = None,
    overrides: Overrides = None,
    redo: Redo = False,
    retry_errors: RetryErrors = False,
) -> None:
    """Let the base agent act under the teacher."""
    _stages(_load(config, overrides, assignments, retry_errors), ("collect",), redo)


@app.command()
def evaluate(
    config: ConfigPath,
    assignments: Assignments = None,
    arm: Arm = "step",
    overrides: Overrides = None,
    redo: Redo = False,
    retry_errors: RetryErrors = False,
    base_url: Annotated[
        str, typer.Option("--base-url", help="a model that is served there, instead of an arm")
    ] = "",
    model: Annotated[str, typer.Option("--model", help="its name there")] = "",
    name: Annotated[str, typer.Option("--name", help="its name in the report")] = "",
    api_key_env: Annotated[
        str, typer.Option("--api-key-env", help="environment variable with its key")
    ] = "",
) -> None:
    """Serve one model and let it play the held-out tasks."""
    if base_url or model or name or api_key_env:
        outside = _load(config, overrides, assignments, retry_errors)
        _outside(outside, base_url, model, name, api_key_env, redo)
        return
    _stages(_load(config, overrides, assignments, retry_errors), (f"evaluate:{arm}",), redo, arm)


@app.command()
def report(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG|RUN... [A.B=C]...", help="configs or folders of runs"),
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="one HTML file with report and episodes, to send away"),
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option("--episodes", min=1, help="most of one agent in the viewer; default 2000"),
    ] = None,
) -> None:
    """Write the report from what the run folder has; what is missing is shown as not run.

    Several runs of one config are put side by side, as `compare` does.
    """
    from step_ray.stages.summary import write_run_report, write_whole_report
    from step_ray.tools.episodes import MOST_EPISODES

    paths = [
        given_path(name)
        for name in targets
        if name == targets[0] or is_url(name) or Path(name).exists()
    ]
    if len(paths) > 1:
        compare(paths, out or Path("compare.html"))
        return
    resolved = given_run(paths[0], [*(overrides or ()), *targets[1:]])
    console, most = Console(highlight=False), episodes or MOST_EPISODES
    if out is None:
        print(write_run_report(resolved, console, most))
    else:
        write_whole_report(resolved, out, console, most)
        print(out)


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="finished runs: folders or s3://...", parser=given_path
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write")] = Path(
        "compare.html"
    ),
) -> None:
    """Put runs of one config with other seeds side by side: each arm over runs."""
    from step_ray.evaluation.compare import compare as compare_runs

    compare_runs(runs, out, Console(highlight=False))


@app.command()
def serve(
    config: ConfigPath,
    assignments: Assignments = None,
    arm: Arm = "step",
    overrides: Overrides = None,
    model_dir: Annotated[
        str | None, typer.Option("--model-dir", help="serve this model folder instead of an arm")
    ] = None,
) -> None:
    """Serve a model with the OpenAI chat API until Ctrl-C."""
    from step_ray.serving.command import serve_forever

    resolved = _load(config, overrides, assignments)
    folder = model_dir or place_of(resolved.run_dir / "models" / arm)
    serve_forever(resolved, folder, arm if model_dir is None else Path(model_dir).name)


@app.command()
def show(
    path: Annotated[
        Path,
        typer.Argument(
            help="folder (or s3://...) of trajectories or of training examples", parser=given_path
        ),
    ],
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
    from step_ray.tools.viewer import Choice, show_path

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
    from step_ray.tools.play import Session, new_task
    from step_ray.tools.play import play as play_session

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
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="look at all that this run needs, too")
    ] = None,
    assignments: Assignments = None,
    overrides: Overrides = None,
) -> None:
    """Look at packages, engines, GPUs, storage, keys, endpoints, the cluster; say what to do."""
    from step_ray.cluster.doctor import report as tell_findings

    resolved = _load(config, overrides, assignments) if config else None
    if not tell_findings(resolved, lambda line: print(line, flush=True)):
        raise typer.Exit(1)


@app.command("spot-watch")
def spot_watch(
    cloud: Annotated[str, typer.Option("--cloud", help="whose machine this is: aws, gcp")],
) -> None:
    """On a spot machine of a cluster: wait for its notice, then drain its Ray node."""
    from step_ray.cluster.spot import watch

    watch(cloud, lambda line: print(line, flush=True))


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _load(
    config: Path,
    overrides: list[str] | None,
    assignments: list[str] | None,
    retry_errors: bool = False,
) -> RunConfig:
    """The config with its overrides, later ones win, and what the flag stands for."""
    flag = ["collect.retry_errors=true"] if retry_errors else []
    return load_config(config, [*(overrides or ()), *(assignments or ()), *flag])


def _stages(
    config: RunConfig, only: Sequence[str] | None, redo: bool, arm: str | None = None
) -> None:
    from step_ray.pipeline import run as run_stages

    if arm is not None and arm != "base" and arm not in config.arms:
        raise ConfigError(f"--arm: {arm!r} is not an arm; use one of {['base', *config.arms]}")
    run_stages(config, reporter_for(config), only=only, redo=redo)


def _outside(
    config: RunConfig, base_url: str, model: str, name: str, api_key_env: str, redo: bool
) -> None:
    from step_ray.cluster.logs import reporter_for
    from step_ray.evaluation.outside import OutsideModel, evaluate_outside

    if not (base_url and model):
        raise ConfigError("--base-url and --model: give both, the address and the model there")
    outside = OutsideModel(base_url=base_url, model=model, name=name, api_key_env=api_key_env)
    evaluate_outside(config, outside, reporter_for(config), redo=redo)


def run_as_job(command: str) -> None:
    """What the scripts in jobs/ call: `--config FILE`, overrides `a.b=c`, the command's flags."""
    parser = argparse.ArgumentParser(
        description=f"step-ray {command} on the cluster of this job; see step-ray {command} --help",
        allow_abbrev=False,
    )
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
        tell_error(str(exc))
        sys.exit(exc.exit_code)
    except SystemExit as exc:
        if exc.code == INTERRUPTED:
            print("step-ray: interrupted; the same command goes on from here", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
