"""An evaluation as a log of Inspect AI, for its viewer and its data frames.

Takes a folder of evaluation episodes, writes one `.eval` or `.json` file with Inspect's own library
(extra `inspect`). Nothing is left out: every episode is a sample, whatever ended it. All samples of
the folder are in memory at a time, because a log is one object there.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_ray import __version__
from step_ray.errors import ConfigError
from step_ray.evaluation.behaviour import is_invalid
from step_ray.evaluation.evalreport import outcome, summarize
from step_ray.react import trajectory_messages
from step_ray.store import atomic, read_trajectories
from step_ray.types import EvalReport, Interval, Message, StopReason, Trajectory

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample, EvalScore

FORMATS = (".eval", ".json")
LIMITS = {StopReason.CONTEXT_LENGTH: "context", StopReason.BUDGET: "cost"}
"""Stop reason -> type of limit in Inspect's words; other truncations ran out of turns."""


def write_inspect_log(folder: Path, out: Path, confidence: float = 0.95) -> int:
    """Write the episodes of a folder as one log and return their number.

    Args:
        folder: of an evaluation, e.g. `runs/demo/evaluate/step`.
        out: file to write, whole or not at all; its ending chooses Inspect's format.
        confidence: of the intervals beside the means.

    Raises:
        ConfigError: the ending is none of `FORMATS`, or inspect-ai is not installed.
        DataError: no folder, or no episodes in it.
    """
    if out.suffix not in FORMATS:
        raise ConfigError(f"OUT: {str(out)!r} must end in one of {list(FORMATS)}")
    try:
        from inspect_ai.log import write_eval_log
    except ImportError as exc:
        raise ConfigError("inspect: inspect-ai is not installed; add the extra inspect") from exc
    trajectories = read_trajectories(folder)
    report = summarize(folder.name, trajectories, confidence, seconds=0.0, seed=0)
    log = inspect_log(trajectories, report)
    with atomic(out) as temp:
        write_eval_log(log, str(temp), format="json" if out.suffix == ".json" else "eval")
    return len(trajectories)


def inspect_log(trajectories: Sequence[Trajectory], report: EvalReport) -> "EvalLog":
    """The log; seeds become epochs, in their order.

    Args:
        trajectories: of one model, at least one.
        report: their summary, for the means and their intervals.
    """
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSpec

    first = trajectories[0].task
    seeds = sorted({t.seed for t in trajectories})
    tasks = sorted({t.task.task_id for t in trajectories})
    spec = EvalSpec(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=f"{first.env}/{first.split}",
        dataset=EvalDataset(name=first.split, samples=len(tasks), sample_ids=tasks),
        model=report.model,
        config=EvalConfig(epochs=len(seeds)),
        packages={"step_ray": __version__},
        metadata={"stop_reasons": dict(report.stop_reasons), "num_errors": report.num_errors},
    )
    results = EvalResults(
        total_samples=len(trajectories),
        completed_samples=len(trajectories) - report.num_errors,
        scores=[
            _score("success", report.success_rate, "Wilson"),
            _score("reward", report.mean_reward, "Student-t"),
        ],
    )
    samples = [_sample(t, seeds.index(t.seed) + 1) for t in trajectories]
    return EvalLog(status="success", eval=spec, results=results, samples=samples)


def _score(name: str, interval: Interval, kind: str) -> "EvalScore":
    from inspect_ai.log import EvalMetric, EvalScore

    values = {"mean": interval.estimate, "low": interval.low, "high": interval.high}
    return EvalScore(
        name=name,
        scorer=name,
        metrics={key: EvalMetric(name=key, value=value) for key, value in values.items()},
        metadata={"interval": kind, "confidence": interval.confidence},
    )


def _sample(trajectory: Trajectory, epoch: int) -> "EvalSample":
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ModelOutput, ModelUsage
    from inspect_ai.scorer import Score

    usage, model = trajectory.usage, trajectory.models.get("student", "")
    read, written = usage.prompt_tokens, usage.completion_tokens
    last = trajectory.steps[-1].text if trajectory.steps else ""
    return EvalSample(
        id=trajectory.task.task_id,
        epoch=epoch,
        input=[_message(message) for message in trajectory.prompt],
        target="",
        messages=[_message(message) for message in trajectory_messages(trajectory)],
        output=ModelOutput.from_content(model, last),
        scores={
            "success": Score(value=float(trajectory.success), explanation=outcome(trajectory)),
            "reward": Score(value=trajectory.reward),
        },
        metadata=_metadata(trajectory),
        model_usage={
            model: ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
        },
        total_time=usage.seconds,
        **_ending(trajectory),
    )


def _message(message: Message) -> Any:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    kinds = {
        "system": ChatMessageSystem,
        "user": ChatMessageUser,
        "assistant": ChatMessageAssistant,
    }
    return kinds[message.role](content=message.content)


def _metadata(trajectory: Trajectory) -> dict[str, Any]:
    task = trajectory.task
    return {
        "trajectory_id": trajectory.trajectory_id,
        "task_type": task.task_type,
        "goal": task.goal,
        "seed": trajectory.seed,
        "stop_reason": trajectory.stop_reason.value,
        "best_reward": trajectory.best_reward,
        "num_steps": len(trajectory.steps),
        "num_invalid": sum(map(is_invalid, trajectory.steps)),
        "actions": [step.action for step in trajectory.steps],
        "rewards": [step.reward for step in trajectory.steps],
    }


def _ending(trajectory: Trajectory) -> dict[str, Any]:
    """The error or the limit that ended the episode, in Inspect's fields."""
    from inspect_ai.log import EvalError, EvalSampleLimit

    ended = outcome(trajectory)
    if ended == "error":
        line = trajectory.error or trajectory.stop_reason.value
        return {"error": EvalError(message=line, traceback="", traceback_ansi="")}
    if ended == "truncated":
        kind: Any = LIMITS.get(trajectory.stop_reason, "turn")
        return {"limit": EvalSampleLimit(type=kind, limit=len(trajectory.steps))}
    return {}
