"""Exports and imports: the loss flag of every turn survives, under every name."""

import json
import lzma

import pytest
from builders import make_step, make_trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from step_ray.data.agenttraj import current_action, current_observation, env_of, read_turn
from step_ray.data.chats import MIXED, ExportPolicy, to_chat
from step_ray.data.export import export_file
from step_ray.data.flags import INVERTED, NAMES, NUMBERS, read_flag, write_flag
from step_ray.data.formats import read_chat
from step_ray.data.ingest import (
    NO_AGENT,
    NOT_ALTERNATING,
    TWO_TRAINED,
    ImportOptions,
    import_file,
)
from step_ray.errors import ConfigError, DataError
from step_ray.react import parse_turn
from step_ray.store import read_trajectories, write_shard
from step_ray.training.masking import NOT_SUCCESSFUL, NOTHING_TRAINED
from step_ray.training.recipe import DatasetConfig, Recipe
from step_ray.types import Source, StepKind

EPISODE = (
    make_step("Action: go", "nothing", StepKind.ERROR),
    make_step("Thought: No.\nAction: take", "mug", StepKind.CORRECTION, index=1),
    make_step("Action: look", "desk", index=2),
)
BEFORE = (
    make_step("Action: go", None, StepKind.ERROR),
    make_step("Action: take", "mug", StepKind.CORRECTION, index=1),
)


def flags(chat):
    return [turn.trained for turn in chat.turns if turn.role == "assistant"]


def export(tmp_path, trajectories, form, flag="", policy=None, name="out"):
    folder = tmp_path / f"{name}_in"
    write_shard(folder, trajectories)
    out = tmp_path / f"{name}{'.parquet' if form == 'parquet' else '.jsonl'}"
    return out, export_file([folder], out, form, flag, policy or ExportPolicy())


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def chat(*turns, **fields):
    """Turns are (role, content, flags of the turn)."""
    return {"messages": [{"role": r, "content": c, **f} for r, c, f in turns], **fields}


ASK = ("user", "room", {})


def imported(tmp_path, *records, **options):
    path = jsonl(tmp_path / "file.jsonl", *records)
    summary = import_file(path, tmp_path / "new", ImportOptions(**options))
    return read_trajectories(tmp_path / "new"), summary


# Flags


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trained", [True, False])
def test_a_flag_says_the_same_when_read_back(name, trained):
    assert read_flag({name: write_flag(name, trained)}, "turn") is trained


def test_masked_is_the_opposite_and_weights_are_numbers():
    assert write_flag("masked", True) is False
    assert [write_flag(name, True) for name in NUMBERS] == [1, 1, 1]
    assert set(NAMES) == {
        *("loss", "trainable", "weight", "train", "masked", "loss_weight", "loss_mask")
    }
    assert INVERTED == ("masked",)


@pytest.mark.parametrize("value", [0.5, 2, -1, "true", [], {}, float("nan")])
def test_a_flag_between_on_and_off_is_refused(value):
    with pytest.raises(DataError, match=r"^file line 3: weight is .* use 0, 1, true or false$"):
        read_flag({"weight": value}, "file line 3")


def test_flags_that_disagree_are_refused():
    with pytest.raises(DataError, match="train is True and masked is True"):
        read_flag({"train": True, "masked": True}, "turn")
    assert read_flag({"train": True, "masked": False, "weight": 1, "loss": None}, "turn") is True


# Export


def test_openai_messages_have_a_weight_on_the_agent_and_nothing_else(tmp_path):
    out, summary = export(tmp_path, [make_trajectory(*EPISODE)], "openai")
    assert json.loads(out.read_text()) == {
        "messages": [
            {"role": "system", "content": "rules"},
            {"role": "user", "content": "room"},
            {"role": "assistant", "content": "Action: go", "weight": 0},
            {"role": "user", "content": "nothing"},
            {"role": "assistant", "content": "Thought: No.\nAction: take", "weight": 1},
            {"role": "user", "content": "mug"},
            {"role": "assistant", "content": "Action: look", "weight": 1},
        ]
    }
    assert (summary.num_written, summary.num_trained, summary.num_masked) == (1, 2, 1)


def test_sharegpt_has_agentgyms_loss_on_every_turn(tmp_path):
    out, _ = export(tmp_path, [make_trajectory(*EPISODE[:2])], "sharegpt")
    row = json.loads(out.read_text())
    assert [(turn["from"], turn["loss"]) for turn in row["conversations"]] == [
        ("system", None),
        ("human", None),
        ("gpt", False),
        ("human", None),
        ("gpt", True),
    ]
    assert (row["trajectory_id"], row["env"], row["source"]) == ("t", "toy", "self_reflected")


def test_policy_of_the_mask_is_the_policy_of_the_flags():
    subopt = make_step("Action: wait", "desk", StepKind.SUBOPTIMAL)
    trajectory = make_trajectory(EPISODE[0], subopt, EPISODE[2])
    assert flags(to_chat(trajectory, ExportPolicy())) == [False, False, True]
    no_mask = ExportPolicy(recipe=Recipe(policy="no_mask"))
    assert flags(to_chat(trajectory, no_mask)) == [True, True, True]
    trained = ExportPolicy(dataset=DatasetConfig(mask_suboptimal=False))
    assert flags(to_chat(trajectory, trained)) == [False, True, True]


def test_a_turn_with_error_and_correction_is_dropped_or_split():
    trajectory = make_trajectory(*BEFORE)
    assert to_chat(trajectory, ExportPolicy()) == MIXED
    split = to_chat(trajectory, ExportPolicy(mixed="split"))
    assert [turn.content for turn in split.turns[2:]] == ["Action: go", "Action: take"]
    assert flags(split) == [False, True]
    whole = to_chat(trajectory, ExportPolicy(recipe=Recipe(policy="no_mask")))
    assert [turn.content for turn in whole.turns[2:]] == ["Action: go\nAction: take"]


def test_what_is_not_exported_is_counted_with_its_reason(tmp_path):
    lost = make_trajectory(*EPISODE, name="a", success=False)
    masked = make_trajectory(EPISODE[0], name="b")
    good = make_trajectory(*EPISODE, name="c")
    _, summary = export(tmp_path, [lost, masked, good], "openai")
    assert summary.dropped == {NOT_SUCCESSFUL: 1, NOTHING_TRAINED: 1}
    assert (summary.num_trajectories, summary.num_written) == (3, 1)


@pytest.mark.parametrize(
    ("form", "name", "flag", "line"),
    [
        ("openai", "there.jsonl", "", "is there already"),
        ("parquet", "new.jsonl", "", "end it with .parquet"),
        ("openai", "new.jsonl", "wieght", "'wieght' is not known; use one of"),
    ],
)
def test_a_wrong_output_is_refused_and_nothing_written(tmp_path, form, name, flag, line):
    (tmp_path / "there.jsonl").write_text("mine")
    write_shard(tmp_path / "in", [make_trajectory(*EPISODE)])
    with pytest.raises(ConfigError, match=line):
        export_file([tmp_path / "in"], tmp_path / name, form, flag, ExportPolicy())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text() == "mine"


# There and back


TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)
KINDS = st.sampled_from(list(StepKind))
STEPS = st.lists(
    st.builds(make_step, TEXTS | TEXTS.map("Action: {}".format), TEXTS | st.none(), KINDS),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("form", ["openai", "sharegpt", "parquet"])
@settings(deadline=None, max_examples=30)
@given(steps=STEPS, flag=st.sampled_from(NAMES))
def test_flags_and_texts_hold_through_export_and_import(tmp_path_factory, form, steps, flag):
    tmp_path = tmp_path_factory.mktemp("trip")
    policy = ExportPolicy(mixed="split")
    trajectory = make_trajectory(*steps)
    before = to_chat(trajectory, policy)
    if before == NOTHING_TRAINED:
        return
    out, _ = export(tmp_path, [trajectory], form, flag, policy)
    try:
        import_file(out, tmp_path / "back", ImportOptions())
    except DataError as exc:  # an episode that hides a trained answer before another one
        assert TWO_TRAINED in str(exc)
        return
    (back,) = read_trajectories(tmp_path / "back")
    after = to_chat(back, policy)
    assert [(t.content, t.trained) for t in after.turns] == [
        (t.content, t.trained) for t in before.turns
    ]


def test_parquet_keeps_kinds_authors_and_facts(tmp_path):
    trajectory = make_trajectory(*EPISODE)
    out, _ = export(tmp_path, [trajectory], "parquet")
    import_file(out, tmp_path / "back", ImportOptions())
    (back,) = read_trajectories(tmp_path / "back")
    assert [s.kind for s in back.steps] == [s.kind for s in EPISODE]
    assert [s.author for s in back.steps] == [s.author for s in EPISODE]
    assert (back.trajectory_id, back.task, back.source) == ("t", trajectory.task, trajectory.source)


def test_an_error_split_from_its_correction_is_an_unexecuted_step_again(tmp_path):
    policy = ExportPolicy(mixed="split")
    out, _ = export(tmp_path, [make_trajectory(*BEFORE)], "sharegpt", policy=policy)
    import_file(out, tmp_path / "back", ImportOptions())
    (back,) = read_trajectories(tmp_path / "back")
    assert [(s.kind, s.observation) for s in back.steps] == [
        (StepKind.ERROR, None),
        (StepKind.ACT, None),
    ]


# Import


def test_a_masked_turn_becomes_an_error_and_an_unflagged_one_is_trained(tmp_path):
    record = chat(ASK, ("assistant", "Action: go", {"train": False}), ASK, ("assistant", "b", {}))
    (trajectory,), summary = imported(tmp_path, record)
    assert [step.kind for step in trajectory.steps] == [StepKind.ERROR, StepKind.ACT]
    assert trajectory.source is Source.SELF_REFLECTED
    assert (summary.num_trained, summary.num_masked, summary.num_unflagged) == (1, 1, 1)
    assert summary.num_unreadable == 1


def test_flags_in_a_list_beside_the_conversation_count(tmp_path):
    record = chat(ASK, ("assistant", "Action: a", {}), ASK, ("assistant", "Action: b", {}))
    (trajectory,), summary = imported(tmp_path, {**record, "loss_mask": [1, 0, 0, 1]})
    assert [step.kind for step in trajectory.steps] == [StepKind.ERROR, StepKind.ACT]
    assert summary.num_foreign == 1


def test_the_first_masked_answer_without_action_is_of_the_prompt(tmp_path):
    turns = [("human", None, "rules"), ("gpt", False, "OK."), ("human", None, "Your task is")]
    turns.append(("gpt", True, "Thought:\nSo.\n\nAction:\nlook around"))
    turns = [{"from": name, "loss": loss, "value": value} for name, loss, value in turns]
    (trajectory,), _ = imported(tmp_path, {"item_id": "sciworld_7", "conversations": turns})
    assert [m.content for m in trajectory.prompt] == ["rules", "OK.", "Your task is"]
    (step,) = trajectory.steps
    assert (step.thought, step.action) == ("So.", "look around")
    assert trajectory.task.task_id == "scienceworld/imported/sciworld_7"
    assert trajectory.source is Source.EXPERT


COMPACT = {
    "id": 3,
    "goal": "put a mug in desk",
    "init": "room",
    "candidate_games": ["pick_and_place_simple-Mug-1/t1", "pick_and_place_simple-Mug-1/t2"],
    "steps": [
        {"thought": "Go.", "action": "put mug 1 in/on desk 1", "observation": "ok"},
        {"thought": None, "action": "look", "observation": None},
    ],
}


def test_agenttrajs_compact_alfworld_episodes_are_read(tmp_path):
    (trajectory,), summary = imported(tmp_path, COMPACT)
    assert [step.text for step in trajectory.steps] == [
        "Thought: Go.\nAction: put mug 1 in/on desk 1",
        "Action: look",
    ]
    assert [step.observation for step in trajectory.steps] == ["ok", None]
    assert (trajectory.task.env, trajectory.task.task_type) == ("alfworld", "pick_and_place_simple")
    assert summary.num_old_wording == 1


def test_rewritten_turns_have_our_form_prompt_and_todays_wording(tmp_path):
    (trajectory,), summary = imported(tmp_path, COMPACT, rewrite=True, prompt="alfworld_short")
    assert trajectory.steps[0].text == "Thought: Go.\nAction: move mug 1 to desk 1"
    assert [m.role for m in trajectory.prompt] == ["system", "user"]
    assert trajectory.prompt[1].content == "room"
    assert (summary.num_rewritten, summary.num_old_wording) == (1, 0)


def test_the_old_wording_is_changed_and_no_other():
    assert current_action("put mug 1 in/on desk 1") == "move mug 1 to desk 1"
    assert current_action("put mug 1 down") == "put mug 1 down"
    old = "You put the mug 1 in/on the desk 1."
    assert current_observation(old) == "You move the mug 1 to the desk 1."
    assert current_observation(old + " ") == old + " "
    assert [env_of(name) for name in ("sciworld_1", "webshop_2", "x", "a/0001")] == [
        *("scienceworld", "webshop", "", "")
    ]


def test_packed_files_and_lists_are_read(tmp_path):
    record = chat(ASK, ("assistant", "Action: a", {}))
    with lzma.open(tmp_path / "file.json.xz", "wt", encoding="utf-8") as file:
        json.dump([record, record], file)
    summary = import_file(tmp_path / "file.json.xz", tmp_path / "new", ImportOptions())
    assert summary.num_trajectories == 2


def test_what_is_no_episode_is_counted_with_its_first_place(tmp_path):
    good = ("assistant", "Action: a", {"weight": 1})
    silent = chat(ASK, ("assistant", "Ok.", {"weight": 0}))
    twice = chat(ASK, good, good)
    _, summary = imported(tmp_path, chat(ASK, good), silent, twice, chat(ASK, good, ASK, ASK))
    assert summary.dropped == {NO_AGENT: 1, TWO_TRAINED: 1, NOT_ALTERNATING: 1}
    assert summary.first_dropped[TWO_TRAINED] == "file.jsonl line 3"
    assert summary.num_records == summary.num_trajectories + summary.dropped.total()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "no episodes in it (it is empty)"),
        ("{", "file.jsonl line 1: not valid JSON"),
        ("[" * 100_000, "file.jsonl line 1: not valid JSON"),
        ("3", "file.jsonl line 1: int where a record is expected"),
        ('{"messages": 3}', "line 1: no list 'messages' or 'conversations'"),
        ('{"messages": [3]}', "line 1 turn 0: int where a message is expected"),
        ('{"messages": [{"role": "tool", "content": ""}]}', "role 'tool' is not known"),
        ('{"messages": [{"role": ["x"], "content": ""}]}', "role ['x'] is not known"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "list where text is expected"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "no valid Unicode"),
        ('{"messages": [], "loss_mask": [1]}', "loss_mask beside the conversation must be"),
        ('{"messages": [], "weight": 0.3}', "weight beside the conversation must be"),
        ('{"messages": [], "id": [1]}', "its id [1] is neither text nor a number"),
        ('{"messages": [], "trajectory_id": "x", "source": "me"}', "source 'me' is none of"),
        ('{"messages": [], "trajectory_id": "x", "success": 2}', "success 2 is neither"),
        ('{"init": "a", "steps": [1]}', "step 0: int where a step is expected"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_its_place(tmp_path, text, line):
    (tmp_path / "file.jsonl").write_text(text)
    with pytest.raises(DataError) as caught:
        import_file(tmp_path / "file.jsonl", tmp_path / "new", ImportOptions())
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_an_id_twice_is_refused_for_one_would_be_lost(tmp_path):
    record = chat(ASK, ("assistant", "Action: a", {}), id="x")
    with pytest.raises(DataError, match=r"line 2: id 'x' is also that of file.jsonl line 1"):
        imported(tmp_path, record, record)


def test_a_folder_that_is_taken_is_refused(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    with pytest.raises(ConfigError, match="is there already"):
        imported(tmp_path, chat(ASK, ("assistant", "Action: a", {})))


@given(TEXTS, TEXTS, st.sampled_from(["", "\n", " ", "\n\nAction:", "Thought:"]))
def test_a_turn_that_the_agent_may_write_is_read_the_same(thought, action, extra):
    text = f"Thought: {thought}{extra}\nAction: {action}"
    strict = parse_turn(text)
    assert strict is None or not strict.action or read_turn(text) == strict


@given(st.recursive(st.none() | st.booleans() | st.integers() | TEXTS, st.lists, max_leaves=5))
def test_no_value_of_a_turn_makes_another_error(value):
    for turn in (value, {"role": "user", "content": value}, {"role": value, "content": "x"}):
        try:
            read_chat({"messages": [turn], "trajectory_id": "t"}, "place", "id")
        except DataError as exc:
            assert str(exc).startswith("place")
