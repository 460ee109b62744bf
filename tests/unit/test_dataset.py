"""Datasets: filters, counts, the recipes' matching, storage and colours."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from builders import PROMPT, make_step, make_task, make_trajectory

from step_ray.data.chats import ExportPolicy, to_chat
from step_ray.dataset import (
    CUT_TO_MATCH,
    Example,
    Sources,
    build_dataset,
    build_examples,
    build_validation,
    read_examples,
    select_for_recipe,
    step_spans,
    write_examples,
)
from step_ray.errors import DataError
from step_ray.react import conversation
from step_ray.render import Renderer, Span
from step_ray.training.masking import (
    LOW_REWARD,
    NOT_SUCCESSFUL,
    OTHER_SOURCE,
    SAME_ROLLOUT,
    TOO_LONG,
)
from step_ray.training.recipe import POLICIES, DatasetConfig, Recipe
from step_ray.training.student import train_tokenizer
from step_ray.types import Source, StepKind, StopReason

TOKENIZER = train_tokenizer(["Action: go take look room rules desk nothing"] * 3, 330)


def trajectory(name, *, success=True, source=Source.EXPERT, steps=None, **fields):
    stop = StopReason.SUCCESS if success else StopReason.MAX_STEPS
    fields = {"success": success, "stop_reason": stop, "source": source} | fields
    return make_trajectory(*(steps or (make_step(),)), name=name, **fields)


def reflected(name, **kwargs):
    steps = (
        make_step("Action: go", "nothing", StepKind.ERROR),
        make_step("Action: take", "desk", StepKind.CORRECTION),
    )
    return trajectory(name, source=Source.SELF_REFLECTED, steps=steps, **kwargs)


def example(name, num_trained=2, source="expert"):
    return Example(
        trajectory_id=name,
        source=source,
        input_ids=(7,) * (num_trained + 1),
        loss_mask=(False,) + (True,) * num_trained,
        error_mask=(False,) * (num_trained + 1),
    )


def build(trajectories, max_length=100, **config):
    renderer = Renderer(TOKENIZER, max_length)
    return build_examples(trajectories, renderer, Recipe(), DatasetConfig(**config))


def kept(examples):
    return [example.trajectory_id for example in examples]


def test_only_successful_trajectories_are_kept_by_default():
    examples, summary = build([trajectory("won"), trajectory("lost", success=False)])

    assert kept(examples) == ["won"]
    assert summary.dropped == {NOT_SUCCESSFUL: 1}
    assert (summary.num_trajectories, summary.num_examples) == (2, 1)


def test_keep_all_keeps_failures():
    examples, summary = build([trajectory("lost", success=False)], keep="all")

    assert kept(examples) == ["lost"]
    assert summary.dropped == {}


def test_min_reward_replaces_success():
    high = trajectory("high", success=False, reward=0.5)
    low = trajectory("low", success=True, reward=0.4)

    examples, summary = build([high, low], min_reward=0.5)

    assert kept(examples) == ["high"]
    assert summary.dropped == {LOW_REWARD: 1}


def test_the_summary_counts_tokens_by_what_happens_to_them():
    [one], summary = build([reflected("a")])

    assert summary.num_tokens == len(one.input_ids)
    assert summary.num_trained_tokens == sum(one.loss_mask)
    assert summary.num_masked_tokens == sum(one.error_mask)
    assert summary.by_source == {"self_reflected": 1}
    agent = sum(one.loss_mask) + sum(one.error_mask)
    assert summary.share_masked == pytest.approx(sum(one.error_mask) / agent)
    assert 0.3 < summary.share_masked < 0.7


def test_a_summary_of_nothing_has_no_masked_share():
    assert build([])[1].share_masked == 0.0


def test_step_spans_give_each_step_its_text_and_the_newline_before_it():
    steps = (
        make_step("a", "x"),
        make_step("bb", None, StepKind.ERROR),
        make_step("ccc", None, StepKind.ERROR),
        make_step("d", "y", StepKind.CORRECTION),
        make_step("e", None),
    )

    spans = step_spans(PROMPT, steps)

    assert spans == [
        Span(message=2),
        Span(message=4, stop=2),
        Span(message=4, start=2, stop=6),
        Span(message=4, start=6),
        Span(message=6),
    ]
    messages = conversation(PROMPT, steps)
    assert [messages[s.message].content[s.start : s.stop] for s in spans] == [
        "a",
        "bb",
        "\nccc",
        "\nd",
        "e",
    ]


def test_an_unexecuted_step_with_no_text_is_not_in_the_way():
    steps = (
        make_step("", None, StepKind.ERROR),
        make_step("Action: go", "desk", StepKind.CORRECTION),
    )

    [one], _ = build([trajectory("a", steps=steps)])

    trained = [token for token, mask in zip(one.input_ids, one.loss_mask, strict=True) if mask]
    assert TOKENIZER.decode(trained) == "\nAction: go<|end|>"
    assert not any(one.error_mask)


def test_golden_only_takes_only_golden_data():
    chosen = select_for_recipe(Recipe(), [example("g")], [example("c")], [example("s")], seed=0)

    assert kept(chosen) == ["g"]


def test_a_recipe_takes_the_sources_that_it_names():
    recipe = Recipe(golden_collect=True, self_reflected=True)

    chosen = select_for_recipe(recipe, [example("g")], [example("c")], [example("s")], seed=0)

    assert kept(chosen) == ["g", "c", "s"]


def test_match_trajectories_cuts_golden_collect_to_the_kept_self_reflected():
    recipe = Recipe(golden_collect=True, match="trajectories")
    collect = [example(f"c{num}") for num in range(20)]
    reflections = [example(f"s{num}") for num in range(7)]

    chosen = select_for_recipe(recipe, [example("g")], collect, reflections, seed=3)

    assert kept(chosen)[0] == "g"
    assert len(set(kept(chosen)[1:])) == 7
    assert set(kept(chosen)[1:]) <= set(kept(collect))


def test_the_cut_depends_on_the_seed_and_the_ids_not_on_the_order():
    recipe = Recipe(golden=False, golden_collect=True, match="trajectories")
    collect = [example(f"c{num}") for num in range(20)]
    reflections = [example(f"s{num}") for num in range(7)]

    def cut(pool, seed):
        return set(kept(select_for_recipe(recipe, [], pool, reflections, seed=seed)))

    assert cut(collect, 0) == cut(collect[::-1], 0)
    assert cut(collect, 0) != cut(collect, 1)
    assert cut(collect, 0) != {f"c{num}" for num in range(7)}


@pytest.mark.parametrize(
    ("reflected_tokens", "counts"),
    [
        (0, [1, 1, 1]),
        (6, [2, 2, 2]),
        (4, [1, 2, 2]),  # 10 tokens asked: a whole pass of 6, then 2 of 2 tokens each.
        (3, [1, 1, 2]),  # 9 asked: 8 and 10 are equally near, the smaller is taken.
        (13, [3, 3, 3]),  # 19 asked: 18 is nearer than 20.
    ],
)
def test_match_trained_tokens_repeats_golden_to_the_nearest_example(reflected_tokens, counts):
    recipe = Recipe(match="trained_tokens")
    golden = [example("a"), example("b"), example("c")]
    reflections = [example("s", reflected_tokens)] if reflected_tokens else []

    names = kept(select_for_recipe(recipe, golden, [], reflections, seed=0))

    assert sorted(names.count(name) for name in "abc") == counts


def test_match_trained_tokens_cuts_a_pool_that_is_larger():
    recipe = Recipe(golden_collect=True, match="trained_tokens")
    collect = [example(f"c{num}") for num in range(10)]

    chosen = select_for_recipe(recipe, [example("g")], collect, [example("s", 4)], seed=0)

    assert sum(one.num_trained for one in chosen) == 6
    assert len(set(kept(chosen))) == 3


def dataset(sources, max_length=100, **recipe):
    renderer = Renderer(TOKENIZER, max_length)
    return build_dataset(sources, renderer, Recipe(**recipe), DatasetConfig(), seed=0)


SOURCES = Sources(
    golden=[trajectory("g1"), trajectory("g2", success=False)],
    golden_collect=[trajectory(f"c{num}") for num in range(5)],
    self_reflected=[reflected("s1"), reflected("s2"), reflected("s3", success=False)],
)


def test_build_dataset_matches_to_kept_trajectories_and_counts_what_was_cut():
    examples, summary = dataset(SOURCES, golden_collect=True, match="trajectories")

    assert len(examples) == summary.num_examples == 3  # g1 and two of c0..c4
    assert summary.dropped == {NOT_SUCCESSFUL: 1, CUT_TO_MATCH: 3}
    assert summary.num_trajectories == 7
    assert (summary.match_target, summary.match_reached) == (2, 2)


def test_a_match_that_falls_short_shows_in_the_summary():
    sources = replace(SOURCES, golden_collect=[trajectory("c0")])

    _, summary = dataset(sources, golden_collect=True, match="trajectories")

    assert (summary.match_target, summary.match_reached) == (2, 1)


def test_build_dataset_counts_repeated_examples():
    examples, summary = dataset(SOURCES, match="trained_tokens")

    assert set(kept(examples)) == {"g1"}
    assert summary.num_repeated == len(examples) - 1 > 0
    assert summary.num_trajectories + summary.num_repeated == len(examples) + 1
    assert summary.match_reached == summary.num_trained_tokens


def test_an_empty_dataset_names_the_sources_the_counts_and_what_to_do():
    with pytest.raises(DataError) as caught:
        dataset(SOURCES, max_length=5, self_reflected=True)

    line = str(caught.value)
    assert f"golden: 2 trajectories, 1 {TOO_LONG}, 1 {NOT_SUCCESSFUL}" in line
    assert f"self_reflected: 3 trajectories, 2 {TOO_LONG}, 1 {NOT_SUCCESSFUL}" in line
    assert "golden_collect" not in line
    assert line.endswith(
        "; collect more tasks or set dataset.keep: all or raise student.max_length"
    )
    assert "\n" not in line


def test_a_dataset_that_is_masked_as_a_whole_says_what_masks_it():
    failed = trajectory("s", source=Source.SELF_REFLECTED, steps=(reflected("a").steps[0],))

    with pytest.raises(DataError) as caught:
        dataset(Sources(self_reflected=[failed]), golden=False, self_reflected=True)

    assert str(caught.value) == (
        "dataset: no training examples (self_reflected: 1 trajectories, 1 nothing trained);"
        " collect more tasks or mask fewer kinds of steps (policy no_mask trains all)"
    )


def test_a_source_of_which_nothing_is_kept_shows_in_the_summary():
    sources = replace(SOURCES, self_reflected=[reflected("s3", success=False)])

    _, summary = dataset(sources, policy="step")

    assert summary.empty_sources == ("self_reflected",)
    assert dataset(SOURCES, policy="step")[1].empty_sources == ()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_export_flags_what_the_mask_of_the_same_policy_trains(policy):
    recipe = Recipe(policy=policy)
    suboptimal = make_step("Action: look", "room", StepKind.SUBOPTIMAL)
    steps = (*reflected("s").steps, suboptimal, make_step())
    one = trajectory("s", source=Source.SELF_REFLECTED, steps=steps)
    [example], _ = build_examples([one], Renderer(TOKENIZER, 100), recipe, DatasetConfig())
    trained = zip(example.input_ids, example.loss_mask, strict=True)

    chat = to_chat(one, ExportPolicy(recipe=recipe))

    if policy == "golden_only":
        assert chat == OTHER_SOURCE
        return
    flagged = [turn.content + "<|end|>" for turn in chat.turns if turn.trained]
    assert TOKENIZER.decode([token for token, mask in trained if mask]) == "".join(flagged)


def test_examples_come_back_equal_and_in_order(tmp_path):
    examples, _ = dataset(SOURCES, self_reflected=True)

    path = write_examples(tmp_path / "arm", examples[::-1])

    assert read_examples(tmp_path / "arm") == examples[::-1]
    schema = pq.read_schema(path)
    assert str(schema.field("input_ids").type) == "list<element: int32>"
    assert str(schema.field("loss_mask").type) == "list<element: bool>"


def test_writing_again_replaces_the_training_set(tmp_path):
    write_examples(tmp_path, [example("a")])
    write_examples(tmp_path, [example("b")])

    assert kept(read_examples(tmp_path)) == ["b"]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("mask", [(True, True), (False, False), (False,), ()])
def test_a_mask_that_cannot_be_right_is_refused(tmp_path, mask):
    bad = Example(trajectory_id="t9", source="expert", input_ids=(1, 2), loss_mask=mask)

    with pytest.raises(DataError, match="t9"):
        write_examples(tmp_path, [example("a"), bad])
    assert list(tmp_path.iterdir()) == []


def test_no_examples_are_not_written(tmp_path):
    with pytest.raises(DataError, match="no examples"):
        write_examples(tmp_path, [])


def test_a_missing_training_set_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"examples\.parquet"):
        read_examples(tmp_path)


def rollout(number, text, *, task="t", success=True):
    steps = (make_step(text),)
    name = f"{task}#{number}"
    return trajectory(
        name, success=success, source=Source.STUDENT, steps=steps, task=make_task(task)
    )


def test_rejection_sampling_trains_each_different_success_once_even_where_failures_are_kept():
    own = [
        rollout(0, "Action: go"),
        rollout(1, "Action: go"),
        rollout(2, "Action: look"),
        rollout(3, "Action: take", success=False),
        rollout(0, "Action: go", task="other"),
    ]

    examples, summary = build_dataset(
        Sources(own_success=own),
        Renderer(TOKENIZER, 100),
        Recipe(golden=False, own_success=True),
        DatasetConfig(keep="all"),
        seed=0,
    )

    assert kept(examples) == ["t#0", "t#2", "other#0"]
    assert summary.dropped == {NOT_SUCCESSFUL: 1, SAME_ROLLOUT: 1}
    assert summary.by_source == {"student": 3}


def test_an_arm_without_own_rollouts_does_not_train_on_them():
    sources = Sources(golden=[trajectory("a")], own_success=[rollout(0, "Action: go")])

    examples, summary = build_dataset(
        sources, Renderer(TOKENIZER, 100), Recipe(), DatasetConfig(), seed=0
    )

    assert kept(examples) == ["a"]
    assert summary.num_trajectories == 1


def test_validation_masks_errors_so_that_unmasked_arms_have_error_tokens_too():
    [one], summary = build_validation([reflected("a")], Renderer(TOKENIZER, 100), DatasetConfig())

    assert sum(one.error_mask) == summary.num_masked_tokens > 0
    assert not any(a and b for a, b in zip(one.loss_mask, one.error_mask, strict=True))


def test_a_validation_set_of_which_nothing_is_kept_is_refused():
    with pytest.raises(DataError, match="no validation example \\(held out: 1 trajectories, 1 not"):
        build_validation(
            [trajectory("a", success=False)], Renderer(TOKENIZER, 100), DatasetConfig()
        )
