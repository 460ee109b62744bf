"""The episode viewer: every episode of a run in one HTML file that opens offline.

Takes groups of trajectories as they come, writes `episodes.html` beside the report, or one file
with the report in it. By itself the report stays a small page that is readable without scripts,
while this needs one and holds all text of the run. The one script is named by its hash, nothing
else may run and nothing may be fetched; all text is packed (JSON, gzip, base64), so that none of it
is ever parsed as HTML, and is unpacked a few episodes at a time, when one of them is opened.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup

from step_ray.evaluation.behaviour import is_invalid
from step_ray.evaluation.evalreport import outcome
from step_ray.report.page import environment, split_reflection
from step_ray.report.results import EpisodeCounts
from step_ray.store import atomic
from step_ray.types import Step, StepKind, Trajectory, Verdict

EPISODES_PER_CHUNK = 16
"""Unpacked together: enough to compress well, little enough to open at once."""
MARKED = tuple(kind for kind in StepKind if kind is not StepKind.ACT)
NO_REPORT = Markup()
TEMPLATES = Path(__file__).parent.parent / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmView:
    """What an arm makes of a trajectory that it trains on, or does not."""

    reason: str = ""
    """Why it is not in the arm's training set; empty: it is."""
    marks: str = ""
    """One letter per step: `t` trained, `m` masked, `r` removed from the text; empty: the arm uses
    no trajectories of this sort."""
    texts: Mapping[int, str] = field(default_factory=dict)
    """Position of a step -> its text, where the arm reads another than the recorded one."""
    ids: Sequence[int] = ()
    """Tokens of its training example."""
    token_marks: str = ""
    """One letter per token: `t` trained, `m` masked, `c` context."""
    times: int = 1
    """How often the example is in the training set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The episodes of one folder."""

    folder: str
    """Inside the run folder, e.g. `evaluate/step`."""
    kind: str
    """Heading of its sort."""
    label: str
    episodes: Iterable[Trajectory]
    """Those that are shown, gone through once."""
    num_shown: int
    num_total: int
    """How many the folder has."""
    views: Callable[[Trajectory], Mapping[str, ArmView]] = lambda trajectory: {}
    """Arm -> what it makes of a trajectory; empty for episodes that are not for training."""


def write_episodes(
    path: Path,
    *,
    run: str,
    run_dir: str,
    groups: Sequence[Group],
    vocabulary: Callable[[], Mapping[int, str]],
    report: Markup = NO_REPORT,
) -> EpisodeCounts:
    """Write the viewer, whole or not at all, and say how many episodes it holds.

    Args:
        path: the HTML file.
        run: name of the run.
        run_dir: its folder, for the command that shows what is left out.
        groups: gone through one after the other, a few episodes in memory at a time.
        vocabulary: called after the groups: token -> text, for all tokens of their views.
        report: `page.report_body`, to stand above the episodes; empty: they stand alone.
    """
    pages = _Pages(run, run_dir, groups)
    style = "".join((TEMPLATES / f).read_text("utf-8") for f in ("style.css", "episodes.css"))
    script = (TEMPLATES / "episodes.js").read_text("utf-8")
    parts = (
        environment()
        .get_template("episodes.html.j2")
        .generate(
            run=run,
            report=report,
            policy=content_policy(script, style),
            style=Markup(style),
            script=Markup(script),
            chunks=pages.chunks(),
            index=lambda: pack(pages.index()),
            vocabulary=lambda: pack(vocabulary()),
        )
    )
    with atomic(path) as temp, temp.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(parts)
    return counts_of(groups)


def counts_of(groups: Sequence[Group]) -> EpisodeCounts:
    """How many episodes a viewer of these groups holds."""
    return EpisodeCounts(
        sum(group.num_shown for group in groups), sum(group.num_total for group in groups)
    )


def content_policy(script: str, style: str) -> str:
    """What the browser lets the page do: run this script, apply this style, no more.

    Trusted types make the browser refuse any text that a script would turn into HTML.
    """
    return (
        f"default-src 'none'; script-src '{_sha256(script)}'; style-src '{_sha256(style)}';"
        " img-src data:; base-uri 'none'; form-action 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def pack(value: Any) -> str:
    """JSON, gzip, base64; the same bytes for the same value."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


class _Pages:
    """The packed episodes of all groups, and the index that is known once they have gone by."""

    def __init__(self, run: str, run_dir: str, groups: Sequence[Group]) -> None:
        self.run, self.run_dir, self.groups = run, run_dir, groups
        self.tasks: dict[str, dict[str, str]] = {}
        self.rows: list[dict[str, Any]] = []

    def chunks(self) -> Iterator[str]:
        """Every episode, `EPISODES_PER_CHUNK` to a chunk."""
        episodes = self._episodes()
        while chunk := list(islice(episodes, EPISODES_PER_CHUNK)):
            yield pack(chunk)

    def _episodes(self) -> Iterator[dict[str, Any]]:
        for number, group in enumerate(self.groups):
            for trajectory in group.episodes:
                task = trajectory.task
                about = {"type": task.task_type, "goal": task.goal}
                self.tasks.setdefault(task.task_id, about)
                self.rows.append({"group": number, **row_of(trajectory)})
                yield episode_of(trajectory, group.views(trajectory))

    def index(self) -> dict[str, Any]:
        """What the list and the filters need; row i is episode i of the chunks."""
        shown = [0] * len(self.groups)
        for row in self.rows:
            shown[row["group"]] += 1
        groups = [
            {
                "folder": group.folder,
                "kind": group.kind,
                "label": group.label,
                "total": group.num_total,
                "shown": number,
            }
            for group, number in zip(self.groups, shown, strict=True)
        ]
        return {
            "runDir": self.run_dir,
            "perChunk": EPISODES_PER_CHUNK,
            "groups": groups,
            "tasks": self.tasks,
            "episodes": self.rows,
        }


def row_of(trajectory: Trajectory) -> dict[str, Any]:
    """What the list shows of an episode and what it is filtered by."""
    return {
        "id": trajectory.trajectory_id,
        "task": trajectory.task.task_id,
        "seed": trajectory.seed,
        "outcome": outcome(trajectory),
        "stop": trajectory.stop_reason.value,
        "reward": f"{trajectory.reward:g}",
        "steps": len(trajectory.steps),
        "has": [kind.value for kind in MARKED if any(s.kind is kind for s in trajectory.steps)],
    }


def episode_of(trajectory: Trajectory, views: Mapping[str, ArmView]) -> dict[str, Any]:
    """All that is shown of an opened episode."""
    return {
        "facts": facts_of(trajectory),
        "error": trajectory.error or "",
        "prompt": [[message.role, message.content] for message in trajectory.prompt],
        "steps": [_step(step) for step in trajectory.steps],
        "arms": {arm: _view(view) for arm, view in views.items()},
    }


def facts_of(trajectory: Trajectory) -> list[tuple[str, str]]:
    """Label and text of what is known about the episode as a whole."""
    usage = trajectory.usage
    cost = usage.student_cost + usage.teacher_cost
    facts = [
        ("stopped by", trajectory.stop_reason.value),
        ("reward", f"{trajectory.reward:g}"),
        ("best reward", f"{trajectory.best_reward:g}"),
        ("steps", f"{len(trajectory.steps):,}, executed {usage.env_steps:,}"),
        ("agent tokens", f"{usage.prompt_tokens:,} read, {usage.completion_tokens:,} written"),
        ("seconds", f"{usage.seconds:.1f}"),
        ("seed", str(trajectory.seed)),
        ("models", ", ".join(f"{role} {model}" for role, model in trajectory.models.items())),
        ("prompt", trajectory.prompt_version),
        ("engine", trajectory.engine),
        ("written by", trajectory.producer),
    ]
    if usage.teacher_calls or usage.teacher_cached_calls:
        cached = f", {usage.teacher_cached_calls:,} cached" if usage.teacher_cached_calls else ""
        read, written = usage.teacher_prompt_tokens, usage.teacher_completion_tokens
        facts.insert(5, ("teacher calls", f"{usage.teacher_calls:,}{cached}"))
        facts.insert(6, ("teacher tokens", f"{read:,} read, {written:,} written"))
    if usage.retries:
        facts.append(("requests sent again", f"{usage.retries:,}"))
    if cost:
        facts.append(("cost", f"{cost:.4g}"))
    return [(label, text) for label, text in facts if text]


def _step(step: Step) -> dict[str, Any]:
    return {
        "index": step.index,
        "kind": step.kind.value,
        "author": step.author.value,
        "parts": split_reflection(step),
        "action": step.action,
        "observation": step.observation,
        "reward": f"{step.reward:+g}" if step.reward else "",
        "tokens": [step.prompt_tokens, step.completion_tokens],
        "seconds": f"{step.seconds:.1f}" if step.seconds else "",
        "invalid": is_invalid(step),
        "verdict": _verdict(step.verdict) if step.verdict else None,
    }


def _verdict(verdict: Verdict) -> dict[str, str]:
    return {
        "label": verdict.label.value,
        "type": verdict.error_type,
        "reflection": verdict.reflection,
        "thought": verdict.thought,
        "action": verdict.action,
    }


def _view(view: ArmView) -> dict[str, Any]:
    return {
        "reason": view.reason,
        "marks": view.marks,
        "texts": {str(place): text for place, text in view.texts.items()},
        "ids": list(view.ids),
        "tokens": view.token_marks,
        "times": view.times,
    }
