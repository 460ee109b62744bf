"""Gathers a run folder into `ReportInputs` and writes report, results and summary.json.

Takes a config whose stages are done (or not: what is missing is shown as not run), gives the path
of the HTML report. It computes no statistics itself.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from step_ray.config import BASE, RunConfig
from step_ray.evaluation.evalreport import summarize
from step_ray.evaluation.scores import SCORES
from step_ray.evaluation.stats import score_by_task, success_by_task
from step_ray.report import (
    CollectionCounts,
    ReportInputs,
    report_body,
    results_table,
    splits_table,
    write_report,
    write_results,
)
from step_ray.report.results import EpisodeCounts
from step_ray.storage.remote import push
from step_ray.storage.runfolder import DONE, RunFolder, fingerprint
from step_ray.store import iter_trajectories, read_json, read_trajectories, write_json
from step_ray.tools.episodes import MOST_EPISODES, write_run_episodes
from step_ray.types import EvalReport, Trajectory


def write_run_report(config: RunConfig, console: Console, most: int = MOST_EPISODES) -> Path:
    """Write `report/index.html` and what lies beside it, and summary.json; print the table.

    Args:
        config: the run.
        console: gets the table.
        most: episodes of one folder in `episodes.html`.
    """
    folder = config.run_dir / "report"
    episodes = write_run_episodes(config, folder / "episodes.html", most)
    inputs = replace(gather(config), episodes=episodes)
    write_report(folder / "index.html", inputs)
    write_results(folder, inputs)
    push(folder)
    write_json(config.run_dir / "summary.json", read_json(folder / "results.json"))
    _print_tables(inputs, console)
    return folder / "index.html"


def write_whole_report(
    config: RunConfig, path: Path, console: Console, most: int = MOST_EPISODES
) -> None:
    """Write report and episodes as one file, to be sent to somebody; print the table.

    Args:
        config: the run.
        path: HTML file to write.
        console: gets the table.
        most: episodes of one folder in it.
    """
    inputs = gather(config)

    def above(counts: EpisodeCounts) -> Markup:
        return report_body(replace(inputs, episodes=counts), viewer="")

    if write_run_episodes(config, path, most, above) is None:
        write_report(path, inputs)
    _print_tables(inputs, console)


def _print_tables(inputs: ReportInputs, console: Console) -> None:
    console.print(results_table(inputs))
    by_split = splits_table(inputs)
    if by_split is not None:
        console.print(by_split)


def gather(config: RunConfig) -> ReportInputs:
    """All that the run folder knows."""
    root = config.run_dir
    plain = config.model_dump(mode="json")
    folders = (path.name for path in sorted((root / "evaluate").glob("*")) if path.is_dir())
    models = list(dict.fromkeys([BASE, *config.arms, *folders]))
    played = {model: _trajectories(root / "evaluate" / model) for model in models}
    played = {model: trajectories for model, trajectories in played.items() if trajectories}
    datasets = {m: _json(root / "datasets" / m / "summary.json") for m in models}
    training = {m: _lines(root / "train" / m / "metrics.jsonl") for m in models}
    return ReportInputs(
        run={"name": config.name, "config_digest": fingerprint(plain), **_facts(root)},
        config=plain,
        evals=[_eval(config, model, trajectories) for model, trajectories in played.items()],
        outcomes={model: success_by_task(t) for model, t in played.items()},
        scores={m: score_by_task(t, SCORES[config.env.scoring]) for m, t in played.items()},
        training={m: lines for m, lines in training.items() if lines},
        collection=_collection(root / "trajectories" / "collect"),
        collection_state=_collection_state(config),
        own=_collection(root / "trajectories" / "own"),
        datasets={m: summary for m, summary in datasets.items() if summary},
        task_types={t.task.task_id: t.task.task_type for ts in played.values() for t in ts},
        splits={t.task.task_id: t.task.split for ts in played.values() for t in ts},
    )


def _eval(config: RunConfig, model: str, trajectories: list[Trajectory]) -> EvalReport:
    is_own = model in (BASE, *config.arms)
    state = RunFolder(config.run_dir).state(f"{'evaluate' if is_own else 'outside'}:{model}")
    seconds = state.summary["seconds"] if state.status == DONE else 0.0
    return summarize(
        model,
        trajectories,
        config.evaluate.confidence,
        seconds,
        config.evaluate.seeds[0],
        config.env.scoring,
    )


def _collection_state(config: RunConfig) -> dict[str, Any]:
    state = RunFolder(config.run_dir).state("collect")
    if state.status is None:
        return {}
    budget = config.teacher.budget.limits
    return {"status": state.status, "budget": budget, "summary": dict(state.summary)}


def _facts(root: Path) -> dict[str, Any]:
    """What run.json says about the latest start."""
    starts: list[dict[str, Any]] = _json(root / "run.json").get("starts", [])
    return {**starts[-1], "num_starts": len(starts)} if starts else {}


def _trajectories(folder: Path) -> list[Trajectory]:
    return read_trajectories(folder) if folder.is_dir() else []


def _collection(folder: Path) -> CollectionCounts:
    return CollectionCounts.of(iter_trajectories(folder) if folder.is_dir() else ())


def _json(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = read_json(path) if path.is_file() else {}
    return record


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
