"""One trajectory in colour on a terminal.

Takes a `Trajectory` and a rich console, prints the prompt and each step with kind, author,
verdict and observation. It knows nothing of tokens; the view of the loss mask is in dataset.py.
"""

from rich.console import Console
from rich.text import Text

from step_ray.types import Step, StepKind, Trajectory, Verdict, VerdictLabel

KIND_STYLES = {
    StepKind.ACT: "bold cyan",
    StepKind.ERROR: "bold red",
    StepKind.SUBOPTIMAL: "bold yellow",
    StepKind.CORRECTION: "bold green",
    StepKind.UNJUDGED: "bold",
}
TEXT_STYLES = {StepKind.ERROR: "red", StepKind.SUBOPTIMAL: "yellow", StepKind.CORRECTION: "green"}
REFLECTION_STYLE = "yellow"


def show_trajectory(trajectory: Trajectory, console: Console) -> None:
    """Print an episode: where it comes from, its prompt (dim), its steps, and how it ended."""
    console.print(Text(visible(trajectory.trajectory_id), "bold"))
    models = [f"{role} {model}" for role, model in trajectory.models.items()]
    facts = [trajectory.task.task_type, trajectory.task.goal, *models]
    console.print(Text(visible(", ".join(fact for fact in facts if fact)), "dim"))
    for message in trajectory.prompt:
        console.print(Text(f"\n{message.role}\n{visible(message.content)}", "dim"))
    for step in trajectory.steps:
        console.print(_step_text(step))
    console.print(_end_text(trajectory))


def _step_text(step: Step) -> Text:
    text = Text(f"\n{step.index} ")
    text.append(step.kind.value, KIND_STYLES[step.kind])
    text.append(f" by {step.author.value}\n", "dim")
    body = Text(visible(step.text), TEXT_STYLES.get(step.kind, ""))
    if step.reflection:
        body.highlight_words([visible(step.reflection)], REFLECTION_STYLE)
    text.append_text(body)
    observation = "(not executed)" if step.observation is None else visible(step.observation)
    text.append(f"\n> {observation}", "dim")
    if step.verdict is not None:
        text.append_text(_verdict_text(step.verdict))
    return text


def _verdict_text(verdict: Verdict) -> Text:
    good = verdict.label is VerdictLabel.GOOD
    text = Text("\nteacher: ", "dim")
    text.append(verdict.label.value, "dim" if good else "red")
    if verdict.error_type:
        text.append(f" ({visible(verdict.error_type)})", "dim")
    return text


def _end_text(trajectory: Trajectory) -> Text:
    outcome = "solved" if trajectory.success else "not solved"
    text = Text("\n")
    text.append(outcome, "bold green" if trajectory.success else "bold red")
    text.append(f", {trajectory.stop_reason.value}, reward {trajectory.reward:g}, ")
    text.append(f"{len(trajectory.steps)} steps, {trajectory.usage.teacher_calls} teacher calls")
    if trajectory.error:
        text.append(f"\n{visible(trajectory.error)}", "red")
    return text


def visible(text: str) -> str:
    r"""The text with unprintable characters written out, e.g. `\x1b`.

    Observations are untrusted; an escape sequence in one must not reach the terminal.
    """
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )
