"""`step-ray data stats | export | inspect | import` and `step-ray replay`: flags in, counts out.

Thin: each command reads its flags, calls one module and prints what became of every record.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from step_ray.config import RunConfig, parse_config
from step_ray.errors import ConfigError
from step_ray.storage.mirror import given_path
from step_ray.training.recipe import POLICIES, DatasetConfig, Recipe

if TYPE_CHECKING:
    from step_ray.data.ingest import ImportSummary
    from step_ray.data.stats import KeepRules
    from step_ray.envs.base import TextEnv
    from step_ray.tools.replay import MakeEnv, ReplayReport
    from step_ray.types import Trajectory

app = typer.Typer(help="Count, export and import trajectories.", no_args_is_help=True)

DataPath = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="run folder, or a folder of trajectories; of a run in a store its s3://...",
        parser=given_path,
    ),
]
Keep = Annotated[str, typer.Option("--keep", help="success or all")]
MinReward = Annotated[
    float | None, typer.Option("--min-reward", help="keep by reward instead of success")
]


@app.command()
def stats(
    path: DataPath,
    model: Annotated[
        str, typer.Option("--model", help="model folder whose tokenizer counts tokens")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Errors and corrections per task type, lengths, what training keeps and why not the rest.

    In a run folder the run's own settings and tokenizer are used, and each arm's data set is shown.
    """
    from step_ray.data.files import trajectory_folders
    from step_ray.data.stats import count_lines, set_stats, type_table
    from step_ray.store import iter_trajectories

    folders = trajectory_folders(path)
    rules = _keep_rules(path, model)
    found = [set_stats(name, iter_trajectories(p), rules) for name, p in folders.items()]
    if as_json:
        print(json.dumps({s.name: asdict(s) for s in found}, indent=2, ensure_ascii=False))
        return
    out = Console(highlight=False)
    for one in found:
        for line in count_lines(one):
            out.print(line, markup=False, soft_wrap=True)
        out.print(type_table(one))
        out.print()
    for line in _dataset_lines(path):
        out.print(line, markup=False, soft_wrap=True)


@app.command("export")
def export_command(
    path: DataPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="new file: .jsonl or .parquet")],
    form: Annotated[str, typer.Option("--format", help="openai, sharegpt or parquet")],
    flag: Annotated[
        str, typer.Option("--flag", help="name of the loss flag (default: the format's own)")
    ] = "",
    keep: Keep = "success",
    min_reward: MinReward = None,
    policy_name: Annotated[
        str, typer.Option("--policy", help=f"flags of one of {', '.join(POLICIES)}")
    ] = "step",
    mask: Annotated[bool, typer.Option(help="flag error steps as not trained")] = True,
    train_suboptimal: Annotated[
        bool, typer.Option("--train-suboptimal", help="flag suboptimal steps as trained")
    ] = False,
    mixed: Annotated[
        str, typer.Option("--mixed", help="turns with error and correction: drop or split")
    ] = "drop",
) -> None:
    """Write trajectories for other training tools, with a loss flag on every turn."""
    from step_ray.data.chats import ExportPolicy
    from step_ray.data.export import export_file
    from step_ray.data.files import trajectory_folders
    from step_ray.data.stats import listed

    _one_of("--format", form, ("openai", "sharegpt", "parquet"))
    _one_of("--keep", keep, ("success", "all"))
    _one_of("--policy", policy_name, tuple(POLICIES))
    _one_of("--mixed", mixed, ("drop", "split"))
    policy = ExportPolicy(
        dataset=DatasetConfig(
            keep=keep,  # type: ignore[arg-type]
            min_reward=min_reward,
        ),
        recipe=_export_recipe(policy_name, mask, train_suboptimal),
        mixed=mixed,  # type: ignore[arg-type]
    )
    folders = trajectory_folders(path).values()
    done = export_file(folders, out, form, flag, policy)  # type: ignore[arg-type]
    print(f"{out}: {done.num_written} of {done.num_trajectories} trajectories")
    print(f"dropped: {listed(done.dropped) or 'none'}")
    print(f"turns of the agent: {done.num_trained} trained, {done.num_masked} masked")


@app.command("inspect")
def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(help="evaluation, e.g. runs/demo/evaluate/step", parser=given_path),
    ],
    out: Annotated[Path, typer.Argument(help="file to write, .eval or .json")],
) -> None:
    """Write an evaluation as a log of Inspect AI, for `inspect view` (extra `inspect`)."""
    from step_ray.data.inspect_log import write_inspect_log

    num = write_inspect_log(path, out)
    print(f"{out}: {num} samples")


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".jsonl, .json or .parquet")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="new folder of trajectories")],
    env: Annotated[str, typer.Option("--env", help="environment of records that name none")] = "",
    source: Annotated[str, typer.Option("--source", help="expert, student or self_reflected")] = "",
    prompt: Annotated[
        str, typer.Option("--prompt", help="prompt version to put before the first observation")
    ] = "",
    rewrite: Annotated[
        bool,
        typer.Option("--rewrite", help="turns in our form, ALFWorld's wording as it is today"),
    ] = False,
) -> None:
    """Read AgentTraj-L, OpenAI messages or ShareGPT; the loss flag of every turn is kept."""
    from step_ray.data.ingest import ImportOptions, import_file
    from step_ray.types import Source

    if source:
        _one_of("--source", source, tuple(known.value for known in Source))
    options = ImportOptions(
        env=env, source=Source(source) if source else None, prompt=prompt, rewrite=rewrite
    )
    for line in _import_lines(out, import_file(file, out, options)):
        print(line)


def replay(
    path: DataPath,
    text: Annotated[str, typer.Option("--id", help="those whose id contains this text")] = "",
    moved: Annotated[
        list[str] | None,
        typer.Option("--moved", metavar="OLD=NEW", help="where the games are now; repeatable"),
    ] = None,
) -> None:
    """Play stored actions again and compare every observation; exit code 1 if any differs."""
    from step_ray.data.files import trajectory_folders
    from step_ray.errors import DataError
    from step_ray.store import iter_trajectories
    from step_ray.tools.replay import moved as with_paths
    from step_ray.tools.replay import parse_moves
    from step_ray.tools.replay import replay as replay_all

    prefixes = parse_moves(moved or ())
    config = _run_config(path)
    chosen = (
        with_paths(trajectory, prefixes)
        for folder in trajectory_folders(path).values()
        for trajectory in iter_trajectories(folder, text=text)
    )
    first = next(chosen, None)
    if first is None:
        raise DataError(f"--id: no trajectory of {str(path)!r} has {text!r} in its id")
    report = replay_all(chain([first], chosen), _env_maker(config))
    for line in _replay_lines(report):
        print(line)
    if not report.ok:
        raise typer.Exit(1)


def _export_recipe(policy: str, mask: bool, train_suboptimal: bool) -> Recipe:
    """The policy with the flags over it."""
    fields: dict[str, Any] = {"policy": policy}
    if not mask:
        fields |= {"mask_errors": False, "mask_suboptimal": None}
    elif train_suboptimal:
        fields["mask_suboptimal"] = False
    return Recipe.model_validate(fields)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{option}: {value!r} is not known; use one of {list(known)}")


def _run_config(path: Path) -> RunConfig | None:
    """The settings of the run that a path belongs to, if it belongs to one."""
    from step_ray.data.files import run_folder_of
    from step_ray.errors import DataError
    from step_ray.store import read_json

    root = run_folder_of(path)
    if root is None:
        return None
    record = read_json(root / "run.json")
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise DataError(f"file {str(root / 'run.json')!r}: no 'config' in it; copy it again")
    return parse_config(record["config"])


def _keep_rules(path: Path, model: str) -> "KeepRules":
    """The rules of the run, and its tokenizer if there is one."""
    from step_ray.data.files import run_folder_of
    from step_ray.data.stats import KeepRules

    config, root = _run_config(path), run_folder_of(path)
    base = root / "models" / "base" if root else None
    source = model or (str(base) if base and base.is_dir() else "")
    return KeepRules(
        dataset=config.dataset if config else DatasetConfig(),
        max_tokens=config.student.max_length if config else None,
        num_tokens=_token_counter(source) if source else None,
    )


def _token_counter(source: str) -> "Callable[[Trajectory], int]":
    import sys

    from step_ray.react import trajectory_messages
    from step_ray.render import Renderer
    from step_ray.training.student import load_tokenizer

    renderer = Renderer(load_tokenizer(source), max_length=sys.maxsize)

    def count(trajectory: "Trajectory") -> int:
        rendered = renderer.render_example(trajectory_messages(trajectory), trained=())
        assert rendered is not None
        return len(rendered.input_ids)

    return count


def _dataset_lines(path: Path) -> list[str]:
    """What each arm of a run folder keeps, as its data set says."""
    from step_ray.data.stats import listed
    from step_ray.store import read_json
    from step_ray.training.holdout import held_out_lines

    lines = []
    for file in sorted((path / "datasets").glob("*/summary.json")):
        summary = read_json(file)
        dropped = listed(summary["dropped"]) or "none"
        lines.append(
            f"dataset {file.parent.name}: {summary['num_examples']} examples of"
            f" {summary['num_trajectories']} trajectories (dropped: {dropped}),"
            f" {summary['num_trained_tokens']} trained and {summary['num_masked_tokens']} masked"
            " tokens"
        )
        lines += held_out_lines(f"dataset {file.parent.name}", summary)
    return lines


def _import_lines(out: Path, done: "ImportSummary") -> list[str]:
    lines = [
        f"{out}: {done.num_trajectories} trajectories of {done.num_records} records",
        f"turns of the agent: {done.num_trained} trained, {done.num_masked} masked",
    ]
    lines += [
        f"dropped: {count} {reason} (first: {done.first_dropped[reason]})"
        for reason, count in done.dropped.items()
    ]
    notes = {
        "turns of the agent without a flag: they are trained": done.num_unflagged,
        "flags on turns that are not the agent's: never trained": done.num_foreign,
        "steps without a readable action": done.num_unreadable,
        "steps rewritten": done.num_rewritten,
        "actions in ALFWorld's old wording, which today's engine refuses: see --rewrite": (
            done.num_old_wording
        ),
    }
    return lines + [f"{count} {note}" for note, count in notes.items() if count]


def _env_maker(config: RunConfig | None) -> "MakeEnv":
    """Builds the environment that a trajectory was made in, as far as is known."""
    from step_ray.envs import make_env

    def make(trajectory: "Trajectory") -> "TextEnv":
        name = trajectory.task.env
        if name == "alfworld":
            engine = trajectory.engine.partition("/")[2]
            return make_env(name, engine=engine or "native")
        same = config is not None and config.env.name == name
        return make_env(name, **(config.env.options() if config and same else {}))

    return make


def _replay_lines(report: "ReplayReport") -> list[str]:
    from step_ray.tools.show import visible

    unplayed = report.unplayed.total()
    observations = report.num_observations - report.num_observations_different
    lines = [
        f"episodes: {report.num_identical} identical, {report.num_different} different,"
        f" {unplayed} not played",
        f"observations: {observations} identical, {report.num_observations_different} different",
    ]
    if report.num_unexecuted:
        lines.append(f"steps never executed: {report.num_unexecuted}")
    lines += [f"other engine: {n} {names}" for names, n in report.other_engines.items()]
    lines += [f"not played: {n} {reason}" for reason, n in report.unplayed.items()]
    if report.first is not None:
        first = report.first
        lines.append(f"first difference: {first.trajectory_id}, {first.place}")
        lines += [f"  action:   {first.action}"] if first.action else []
        lines += [f"  recorded: {first.recorded!r}", f"  replayed: {first.replayed!r}"]
        lines.append(f"  from byte {first.offset} on")
    return [visible(line) for line in lines]
