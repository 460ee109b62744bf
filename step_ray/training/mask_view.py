"""A training set for the eye: an example or a micro-batch with its mask in colour, and the counts.

Takes examples and their tokenizer, gives rich text and lines. What is shown of a micro-batch is
read off the tensors that the loss gets, not off the examples. It decides and trains nothing.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from step_ray.dataset import DatasetSummary, Example
from step_ray.tools.show import visible
from step_ray.training.turnend import end_of_turn

TRAINED, MASKED, CONTEXT, PADDING = "green", "dim red", "dim", "dim blue"
ENDS = {TRAINED: "bold reverse green", MASKED: "dim reverse red"}
"""Style of the end-of-turn token in a turn of the agent."""
LEGEND = Text.assemble(
    ("trained", TRAINED),
    ("<end of turn>", ENDS[TRAINED]),
    " ",
    ("masked error", MASKED),
    ("<end of turn>", ENDS[MASKED]),
    " ",
    ("context", CONTEXT),
)


def colour_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The example as text: trained tokens green, masked errors dim red, the rest dim.

    The end-of-turn token of each of the agent's turns stands out in reverse.
    """
    errors = example.error_mask or (False,) * len(example.input_ids)
    return colour_tokens(example.input_ids, example.loss_mask, errors, tokenizer)


def colour_tokens(
    ids: Sequence[int],
    trained: Sequence[bool],
    errors: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
) -> Text:
    """Tokens as text, each in the colour of what happens to it; all sequences have one length."""
    end = end_of_turn(tokenizer)
    styles = [
        _style(token == end, *flags) for token, *flags in zip(ids, trained, errors, strict=True)
    ]
    text = Text()
    for style, first, last in _runs(styles):
        text.append(visible(_decode(tokenizer, ids, first, last)), style=style)
    return text


def count_lines(name: str, summary: DatasetSummary) -> list[str]:
    """What became of the trajectories and tokens of an arm: a line each, and what is missing."""
    sources = ", ".join(f"{count} {source}" for source, count in summary.by_source.items())
    dropped = ", ".join(f"{count} {reason}" for reason, count in summary.dropped.items())
    repeated = f", {summary.num_repeated} of them repeated" if summary.num_repeated else ""
    context = summary.num_tokens - summary.num_trained_tokens - summary.num_masked_tokens
    lines = [
        f"{name}: {summary.num_examples} examples ({sources}{repeated}) of"
        f" {summary.num_trajectories} trajectories; dropped: {dropped or 'none'}",
        f"{name}: {summary.num_trained_tokens:,} tokens trained,"
        f" {summary.num_masked_tokens:,} masked error tokens, {context:,} of context",
    ]
    return [*lines, *(f"{name}: nothing of {one} was kept" for one in summary.empty_sources)]


def _style(is_end: bool, is_trained: bool, is_error: bool) -> str:
    style = TRAINED if is_trained else MASKED if is_error else CONTEXT
    return ENDS.get(style, style) if is_end else style


def _runs(styles: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Each run of equal styles with its `[first, last)`."""
    first = 0
    for style, run in groupby(styles):
        last = first + len(list(run))
        yield style, first, last
        first = last


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], first: int, last: int) -> str:
    """The text of some tokens; with the one before them, for decoders drop a leading blank."""

    def text(start: int, stop: int) -> str:
        return str(tokenizer.decode(list(ids[start:stop]), clean_up_tokenization_spaces=False))

    before = text(first - 1, first) if first else ""
    both = text(max(first - 1, 0), last)
    return both[len(before) :] if both.startswith(before) else text(first, last)
