"""Training sets for the eye: colours, counts, and nothing that a terminal would obey."""

import pytest
from builders import make_step, make_trajectory
from chat_formats import make_tokenizer

from step_ray.dataset import DatasetSummary, Example, build_examples
from step_ray.render import Renderer
from step_ray.training.mask_view import colour_example, count_lines
from step_ray.training.recipe import DatasetConfig, Recipe
from step_ray.training.student import train_tokenizer
from step_ray.types import StepKind

TOKENIZER = train_tokenizer(["Action: go take look room rules desk nothing"] * 3, 330)
STEPS = (
    make_step("Action: go", "nothing", StepKind.ERROR),
    make_step("Action: take", "desk", StepKind.CORRECTION),
)


def example(tokenizer=TOKENIZER, steps=STEPS):
    renderer = Renderer(tokenizer, 1000)
    [one], _ = build_examples([make_trajectory(*steps)], renderer, Recipe(), DatasetConfig())
    return one


def coloured(text):
    parts = {}
    for span in text.spans:
        style = str(span.style)
        parts[style] = parts.get(style, "") + text.plain[span.start : span.end]
    return parts


def test_colours_show_trained_masked_and_given_text_and_the_ends_of_turns():
    assert coloured(colour_example(example(), TOKENIZER)) == {
        "dim": "<|bos|><|system|>rules<|end|><|user|>room<|end|><|assistant|>"
        "<|user|>nothing<|end|><|assistant|>",
        "dim red": "Action: go",
        "dim reverse red": "<|end|>",
        "green": "Action: take",
        "bold reverse green": "<|end|>",
    }


@pytest.mark.parametrize("kind", ["sp_legacy", "byte_level"])
def test_the_text_of_neighbouring_runs_keeps_its_blanks(kind):
    tokenizer = make_tokenizer("llama2", kind)

    text = colour_example(example(tokenizer), tokenizer)

    assert coloured(text)["dim red"] == " Action: go "
    assert "[/INST] Action: take </s>" in text.plain


def test_an_escape_sequence_in_an_observation_is_written_out():
    steps = (make_step("Action: go", "\x1b]0;owned\x07"), STEPS[1])

    text = colour_example(example(steps=steps), TOKENIZER).plain

    assert "\x1b" not in text and r"\x1b]0;owned\x07" in text


def test_counts_name_examples_tokens_and_every_reason():
    summary = DatasetSummary(
        num_trajectories=7,
        num_examples=5,
        by_source={"expert": 3, "self_reflected": 2},
        dropped={"not successful": 2, "cut to match": 1},
        num_tokens=5000,
        num_trained_tokens=1200,
        num_masked_tokens=300,
        num_repeated=1,
    )

    assert count_lines("step", summary) == [
        "step: 5 examples (3 expert, 2 self_reflected, 1 of them repeated) of 7 trajectories;"
        " dropped: 2 not successful, 1 cut to match",
        "step: 1,200 tokens trained, 300 masked error tokens, 3,500 of context",
    ]


def test_an_example_without_error_mask_has_no_red():
    plain = Example(
        trajectory_id="a", source="expert", input_ids=(9, 9, 3), loss_mask=(False, True, True)
    )

    assert set(coloured(colour_example(plain, TOKENIZER))) == {"dim", "green", "bold reverse green"}
