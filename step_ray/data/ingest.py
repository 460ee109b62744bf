"""`step-ray data import`: foreign conversations -> trajectories, loss flags kept as step kinds.

Takes a file, writes one shard into a new folder. A masked turn becomes an error step and a trained
one an ordinary step, so every mask policy that masks errors trains exactly what was flagged. What
is no episode is counted with its reason; what cannot be understood is refused with its place.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from step_ray import __version__
from step_ray.data.agenttraj import (
    current_action,
    current_observation,
    env_of,
    is_compact,
    read_compact,
    read_turn,
)
from step_ray.data.chats import Chat, ChatTurn
from step_ray.data.files import check_fresh, read_records
from step_ray.data.formats import read_chat
from step_ray.errors import DataError
from step_ray.react import format_turn, initial_messages
from step_ray.store import write_large_shard
from step_ray.types import (
    Author,
    Message,
    Source,
    Step,
    StepKind,
    StopReason,
    Task,
    Trajectory,
    best_sum,
)

NO_AGENT = "no turn of an agent that acts or is trained"
TWO_TRAINED = "two turns of the agent in a row, the first one trained"
NOT_ALTERNATING = "turns of agent and environment do not alternate"
MASKED_KINDS = (StepKind.ERROR, StepKind.SUBOPTIMAL, StepKind.UNJUDGED)
TRAINED_KINDS = (StepKind.ACT, StepKind.CORRECTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the file itself does not say."""

    env: str = ""
    """Environment of records that name none; empty: `imported`."""
    source: Source | None = None
    """None: as the record says, else expert when nothing is masked, else self_reflected."""
    prompt: str = ""
    """Instruction version that replaces what stands before the first observation; empty: keep."""
    rewrite: bool = False
    """Turns as our agents write them, ALFWorld's wording as today's engine has it."""


@dataclass(slots=True, kw_only=True)
class ImportSummary:
    """What became of the records: `num_records = num_trajectories + dropped`."""

    num_records: int = 0
    num_trajectories: int = 0
    num_trained: int = 0
    """Steps."""
    num_masked: int = 0
    """Steps and turns of the prompt."""
    num_unflagged: int = 0
    """Turns of the agent without a flag; they are trained."""
    num_foreign: int = 0
    """Flags that ask to train a turn that is not the agent's; it is not trained."""
    num_unreadable: int = 0
    """Steps without a thought-action form; they have no action to replay."""
    num_rewritten: int = 0
    num_old_wording: int = 0
    """Actions `put X in/on Y` that are kept; today's ALFWorld does not know them."""
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason -> where it was first met."""


def import_file(path: Path, out: Path, options: ImportOptions) -> ImportSummary:
    """Read a file and write its trajectories as one shard of a new folder.

    Raises:
        ConfigError: the folder is taken, or the prompt version is unknown.
        DataError: a record that cannot be understood, an id twice, or nothing to import.
    """
    check_fresh(out)
    summary = ImportSummary()
    trajectories = _trajectories(path, options, summary)
    first = next(trajectories, None)
    if first is None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.dropped.items())
        raise DataError(f"file {str(path)!r}: no episodes in it ({reasons or 'it is empty'})")
    write_large_shard(out, chain([first], trajectories))
    return summary


def _trajectories(
    path: Path, options: ImportOptions, summary: ImportSummary
) -> Iterator[Trajectory]:
    places: dict[str, str] = {}
    stem = path.name.partition(".")[0]
    for place, row in read_records(path):
        read = read_compact if is_compact(row) else read_chat
        chat = read(row, place, f"{stem}/{summary.num_records:07d}")
        summary.num_records += 1
        if chat.chat_id in places:
            raise DataError(
                f"{place}: id {chat.chat_id!r} is also that of {places[chat.chat_id]}; ids name"
                " episodes, give each its own"
            )
        places[chat.chat_id] = place
        outcome = _Import(chat, options, summary).trajectory()
        if isinstance(outcome, Trajectory):
            summary.num_trajectories += 1
            yield replace(outcome, producer=f"step_ray {__version__} import of {path.name}")
        else:
            summary.dropped[outcome] += 1
            summary.first_dropped.setdefault(outcome, place)


class _Import:
    """The import of one conversation."""

    def __init__(self, chat: Chat, options: ImportOptions, summary: ImportSummary) -> None:
        self._chat, self._options, self._summary = chat, options, summary
        self._env = chat.env or env_of(chat.chat_id) or options.env or "imported"
        self._source = options.source or chat.source

    def trajectory(self) -> Trajectory | str:
        """The trajectory, or why there is none; what is dropped is not counted as turns."""
        turns = self._chat.turns
        first = next((n for n, turn in enumerate(turns) if _is_step(turn)), None)
        if first is None:
            return NO_AGENT
        if self._source is None:
            masked = any(turn.trained is False for turn in turns[first:])
            self._source = Source.SELF_REFLECTED if masked else Source.EXPERT
        steps = self._steps(turns[first:])
        if isinstance(steps, str):
            return steps
        self._count(turns, turns[first:])
        return self._record(self._prompt(turns[:first]), tuple(map(self._finished, steps)))

    def _prompt(self, turns: Sequence[ChatTurn]) -> tuple[Message, ...]:
        """What stands before the first step: as it came, or our instruction and the last of it."""
        if self._options.prompt:
            observation = turns[-1].content if turns else ""
            return initial_messages(self._options.prompt, observation)
        return tuple(Message(role=turn.role, content=turn.content) for turn in turns)

    def _steps(self, turns: Sequence[ChatTurn]) -> list[Step] | str:
        steps: list[Step] = []
        for turn in turns:
            open_step = steps[-1] if steps and steps[-1].observation is None else None
            if turn.role == "assistant":
                if open_step is not None and open_step.kind in TRAINED_KINDS:
                    return TWO_TRAINED
                steps.append(self._step(turn, len(steps)))
            elif turn.role == "user" and open_step is not None:
                steps[-1] = replace(open_step, observation=turn.content)
            else:
                return NOT_ALTERNATING
        return steps

    def _step(self, turn: ChatTurn, index: int) -> Step:
        kind, read = _kind(turn), read_turn(turn.content)
        author = Author.EXPERT if self._source is Source.EXPERT else Author.STUDENT
        return Step(
            index=index,
            kind=kind,
            author=Author.TEACHER if kind is StepKind.CORRECTION else author,
            text=turn.content,
            thought=read.thought if read else "",
            action=read.action if read else "",
        )

    def _finished(self, step: Step) -> Step:
        """The step as it is stored: rewritten if that was asked for."""
        alfworld = self._env == "alfworld"
        action = current_action(step.action) if alfworld else step.action
        if not self._options.rewrite:
            self._summary.num_old_wording += action != step.action
            return step
        observation = step.observation
        if alfworld and observation is not None:
            observation = current_observation(observation)
        text = format_turn(step.thought, action) if action else step.text
        self._summary.num_rewritten += text != step.text
        return replace(step, text=text, action=action, observation=observation)

    def _count(self, turns: Sequence[ChatTurn], acting: Sequence[ChatTurn]) -> None:
        summary = self._summary
        for turn in turns:
            agent = turn.role == "assistant"
            summary.num_masked += agent and turn.trained is False
            summary.num_unflagged += agent and turn.trained is None
            summary.num_foreign += not agent and turn.trained is True
        agent_turns = [turn for turn in acting if turn.role == "assistant"]
        summary.num_trained += sum(turn.trained is not False for turn in agent_turns)
        summary.num_unreadable += sum(read_turn(turn.content) is None for turn in agent_turns)

    def _record(self, prompt: tuple[Message, ...], steps: tuple[Step, ...]) -> Trajectory:
        """The record; an outcome that is not given is taken to be success, as in all such data."""
        chat, source = self._chat, self._source
        assert source is not None
        success = chat.success is not False
        reward = chat.reward if chat.reward is not None else float(success)
        steps = (*steps[:-1], replace(steps[-1], reward=reward))
        task = Task(
            task_id=chat.task_id or f"{self._env}/imported/{chat.chat_id}",
            env=self._env,
            split=chat.split or "imported",
            goal=chat.goal,
            task_type=chat.task_type,
        )
        return Trajectory(
            trajectory_id=chat.chat_id if chat.task_id else f"{task.task_id}#{source.value}#0",
            task=task,
            prompt=prompt,
            steps=steps,
            reward=reward,
            best_reward=best_sum(steps),
            success=success,
            stop_reason=StopReason.SUCCESS if success else StopReason.ENV_DONE,
            source=source,
            seed=0,
            prompt_version=self._options.prompt,
        )


def _is_step(turn: ChatTurn) -> bool:
    """Whether a turn acts; a masked answer without action before that (`Ok.`) is of the prompt."""
    acts = turn.trained is not False or read_turn(turn.content) is not None
    return turn.role == "assistant" and acts


def _kind(turn: ChatTurn) -> StepKind:
    """The kind that trains what the flag says; the recorded one if it does."""
    kinds = MASKED_KINDS if turn.trained is False else TRAINED_KINDS
    return next((kind for kind in kinds if kind.value == turn.kind), kinds[0])
