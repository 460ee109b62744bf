"""Gathers the episodes of a run folder for the viewer, with what each arm trains of them.

Takes a config whose stages are done (or not), writes one HTML file (report/episodes.py). It reads
episodes and training examples a few at a time, and decides nothing: what is trained is said by
masking.py and by the training sets on disk.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from step_ray.config import BASE, Recipe, RunConfig
from step_ray.report.episodes import NO_REPORT, ArmView, Group, counts_of, write_episodes
from step_ray.report.results import EpisodeCounts
from step_ray.storage.places import shown
from step_ray.storage.shards import read_table
from step_ray.store import finished_ids, iter_trajectories
from step_ray.training.masking import is_trained, steps_in_text, unwanted
from step_ray.types import Trajectory

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_EPISODES = 2000
"""Of one folder in the file, unless asked for more."""
EVALUATION, COLLECTION, GOLDEN = "Evaluation", "Collection", "Golden"
LABELS = {
    "collect": (COLLECTION, "collection"),
    "golden": (GOLDEN, "golden U1"),
    "golden_collect": (GOLDEN, "golden U2"),
}
"""Folder in `trajectories/` -> sort and name of its episodes."""
USED_BY = {
    "collect": "self_reflected",
    "golden": "golden",
    "golden_collect": "golden_collect",
    "own": "own_success",
}
"""Folder in `trajectories/` -> field of a `Recipe` that says whether the arm trains on them."""
OTHER_REASON = "too long, nothing trained, or cut to match: counted under Training data"


def write_run_episodes(
    config: RunConfig,
    path: Path,
    most: int = MOST_EPISODES,
    report: Callable[[EpisodeCounts], Markup] | None = None,
) -> EpisodeCounts | None:
    """Write the viewer of a run and say how many episodes it holds; of none there is no file.

    Args:
        config: the run.
        path: HTML file to write.
        most: episodes of one folder. Of a larger one those are taken whose task ids come first by
            a hash, so that all agents are shown on the same tasks.
        report: what stands above the episodes, see `report.page.report_body`; None: nothing.
    """
    tokens = Tokens(config.run_dir)
    groups = run_groups(config, tokens, most)
    if not groups:
        path.unlink(missing_ok=True)
        return None
    counts = counts_of(groups)
    write_episodes(
        path,
        run=config.name,
        run_dir=shown(config.run_dir),
        groups=groups,
        vocabulary=tokens.vocabulary,
        report=report(counts) if report else NO_REPORT,
    )
    return counts


def run_groups(config: RunConfig, tokens: "Tokens", most: int) -> list[Group]:
    """Evaluations in the order of the arms, other models after them, then what is trained on."""
    root = config.run_dir
    models = [BASE, *config.arms]
    played = {name: root / "evaluate" / name for name in [*models, *_folders(root / "evaluate")]}
    trained = {name: root / "trajectories" / name for name in LABELS}
    trained |= {name: root / "trajectories" / name for name in _folders(root / "trajectories")}
    chosen = {folder: Chosen.of(folder, most) for folder in [*played.values(), *trained.values()]}
    wanted = [trajectory_id for f in trained.values() for trajectory_id in chosen[f].ids]
    arms = [ArmData(config, arm, tokens, wanted) for arm in models]
    groups = [_group(root, f, (EVALUATION, name), chosen[f]) for name, f in played.items()]
    groups += [
        _group(root, f, LABELS.get(name, (COLLECTION, name)), chosen[f], arms)
        for name, f in trained.items()
    ]
    return [group for group in groups if group.num_total]


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.is_dir())


class Chosen(NamedTuple):
    """Which episodes of a folder are shown."""

    ids: list[str]
    num_total: int

    @classmethod
    def of(cls, folder: Path, most: int) -> "Chosen":
        """Of all episodes of a folder, which may be missing, at most so many."""
        ids = finished_ids(folder, retry=()).to_pylist()
        return cls(first_by_hash(ids, most), len(ids))


def _group(
    root: Path, folder: Path, names: tuple[str, str], chosen: Chosen, arms: Sequence["ArmData"] = ()
) -> Group:
    kind, label = names

    def views(trajectory: Trajectory) -> Mapping[str, ArmView]:
        return {arm.name: arm.view(trajectory, folder.name) for arm in arms}

    return Group(
        folder=folder.relative_to(root).as_posix(),
        kind=kind,
        label=label,
        episodes=iter_trajectories(folder, ids=pa.array(chosen.ids, pa.large_string())),
        num_shown=len(chosen.ids),
        num_total=chosen.num_total,
        views=views,
    )


def first_by_hash(ids: list[str], most: int) -> list[str]:
    """At most `most` trajectory ids, whole tasks first; all folders agree on the tasks."""
    if len(ids) <= most:
        return ids

    def place(trajectory_id: str) -> tuple[bytes, str]:
        task_id = trajectory_id.rsplit("#", 2)[0]
        return hashlib.sha256(task_id.encode()).digest(), trajectory_id

    return sorted(ids, key=place)[:most]


class ArmData:
    """One arm: its policy, and of its training set, where it is built, the examples wanted."""

    def __init__(
        self, config: RunConfig, name: str, tokens: "Tokens", wanted: Sequence[str]
    ) -> None:
        self.name = name
        self._config = config.dataset
        self._recipe = Recipe(init="student") if name == BASE else config.arms[name]
        self._tokens = tokens
        file = config.run_dir / "datasets" / name / "examples.parquet"
        self._table = _examples(file, wanted) if file.is_file() else None
        self._rows: dict[str, list[int]] = {}
        ids = self._table["trajectory_id"].to_pylist() if self._table else []
        for row, trajectory_id in enumerate(ids):
            self._rows.setdefault(trajectory_id, []).append(row)

    def view(self, trajectory: Trajectory, folder: str) -> ArmView:
        """What the arm makes of a trajectory of `trajectories/<folder>`."""
        rows = self._rows.get(trajectory.trajectory_id, [])
        uses = getattr(self._recipe, USED_BY.get(folder, ""), False)
        if not rows and not uses:
            return ArmView(reason="the arm does not train on these")
        marks, texts = self._marks(trajectory)
        if not rows:
            return ArmView(reason=self._why_not(trajectory), marks=marks, texts=texts)
        assert self._table is not None
        ids, trained, errors = (
            self._table[column][rows[0]].as_py()
            for column in ("input_ids", "loss_mask", "error_mask")
        )
        self._tokens.note(self.name, ids)
        return ArmView(
            marks=marks,
            texts=texts,
            ids=ids,
            token_marks=token_marks(trained, errors),
            times=len(rows),
        )

    def _marks(self, trajectory: Trajectory) -> tuple[str, dict[int, str]]:
        """A letter per step, and the texts that the arm words in another way."""
        in_text = {s.index: s for s in steps_in_text(trajectory, self._recipe, self._config)}
        marks, texts = "", {}
        for place, step in enumerate(trajectory.steps):
            read = in_text.get(step.index)
            if read is None:
                marks += "r"
                continue
            marks += "t" if is_trained(read, self._recipe, self._config) else "m"
            if read.text != step.text:
                texts[place] = read.text
        return marks, texts

    def _why_not(self, trajectory: Trajectory) -> str:
        if self._table is None:
            return "the training set is not built"
        return unwanted(trajectory, self._config) or OTHER_REASON


def _examples(file: Path, wanted: Sequence[str]) -> pa.Table:
    """The examples of these trajectories, as often as they are in a training set."""
    table = read_table(file)
    return table.filter(pc.is_in(table["trajectory_id"], pa.array(wanted, pa.string())))


def token_marks(trained: list[bool], errors: list[bool]) -> str:
    """A letter per token, see `ArmView.token_marks`; `errors` may be empty: none."""
    pairs = zip(trained, errors or [False] * len(trained), strict=True)
    return "".join("t" if train else "m" if error else "c" for train, error in pairs)


class Tokens:
    """The tokens of all examples that were viewed, and what the run's tokenizer reads them as."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._used: set[int] = set()
        self._arm = ""

    def note(self, arm: str, ids: list[int]) -> None:
        """Tokens of an arm's example; all arms of a run have one tokenizer, the student's."""
        self._arm = self._arm or arm
        self._used.update(ids)

    def vocabulary(self) -> dict[int, str]:
        """Token -> text; empty where the model that has the tokenizer is gone."""
        places = (f"datasets/{self._arm}/tokenizer", f"models/{self._arm}")
        files = [self._run_dir / place / "tokenizer.json" for place in places]
        file = next((file for file in files if file.is_file()), files[0])
        if not self._used or not file.is_file():
            return {}
        from tokenizers import Tokenizer

        return pieces(Tokenizer.from_file(str(file)), self._used)


def pieces(tokenizer: "Tokenizer", ids: set[int]) -> dict[int, str]:
    """The text of each token inside a text: decoders drop the blank of a first one.

    A token that is a part of a character reads as U+FFFD.
    """
    before = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
    head = tokenizer.decode(before, skip_special_tokens=False)
    texts = {}
    for token in sorted(ids):
        text = tokenizer.decode([*before, token], skip_special_tokens=False)
        alone = tokenizer.decode([token], skip_special_tokens=False)
        texts[token] = text[len(head) :] if text.startswith(head) else alone
    return texts
