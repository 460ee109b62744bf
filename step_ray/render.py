"""Chat messages -> token ids: the prompt of a rollout, and a training example with its loss mask.

Takes messages and spans of assistant turns, gives ids and masks of equal length. Both come from
one rendering and one encoder, so what is served is what was trained. It decides nothing about what
is trained (dataset.py does), never searches the text for a turn, and never cuts an example.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from step_ray.errors import ConfigError, TemplateError, boundary
from step_ray.training.chat_template import refuse_today
from step_ray.training.encoding import MARK, Chat, Encoder, Tokens, blot, check_free
from step_ray.training.turnend import end_of_turn
from step_ray.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Characters `[start, stop)` of the content of one assistant message."""

    message: int
    """Position in the conversation."""
    start: int = 0
    """0: from the first token that the agent generates."""
    stop: int | None = None
    """None: to the end of the turn, the end-of-turn token included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as tokens; the three sequences have one length."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True: the token is trained."""
    error_mask: tuple[bool, ...]
    """True: the token is the agent's and kept out of the loss. For display and counts only."""


class Renderer:
    """Renders conversations with the chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """Prepare for a fast tokenizer with a chat template; `max_length` is in tokens.

        Raises:
            ConfigError: the tokenizer is slow or has no chat template.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(f"student.init: {tokenizer.name_or_path!r} has no fast tokenizer")
        if not tokenizer.chat_template:
            raise ConfigError(f"student.init: {tokenizer.name_or_path!r} has no chat template")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.end_id = end_of_turn(tokenizer)
        self._encoder = Encoder(backend, tokenizer.unk_token_id, self.end_id)

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation with the generation prompt; not limited by `max_length`.

        Raises:
            TemplateError: the template refuses the messages.
        """
        return self._encoder.encode(self._chat(messages, generation=True)).ids

    def render_example(
        self,
        messages: Sequence[Message],
        trained: Sequence[Span],
        masked: Sequence[Span] = (),
    ) -> Rendered | None:
        """Token ids of the conversation, True where a `trained` span is; None when too long.

        A turn runs from the first token after its prompt to its end-of-turn token (turnend.py);
        what a template writes behind that token (ChatML: a newline) is not trained, for generation
        stops before. A token over the edge of a span inside a message is not in the span.

        Raises:
            TemplateError: for a turn of a span, the prompt is not a token prefix of the whole, or
                the template renders it differently once later messages follow.
        """
        full = self._chat(messages, generation=False)
        tokens = self._encoder.encode(full)
        if len(tokens.ids) > self.max_length:
            return None
        spans = (*trained, *masked)
        indices = sorted({span.message for span in spans})
        turns = {index: self._turn(messages, index, full, tokens) for index in indices}
        cuts = self._cuts(messages, spans, full.text)
        return Rendered(
            input_ids=tuple(tokens.ids),
            loss_mask=_mask(tokens, trained, turns, cuts),
            error_mask=_mask(tokens, masked, turns, cuts),
        )

    def _turn(self, messages: Sequence[Message], index: int, full: Chat, tokens: Tokens) -> range:
        """Token range of one assistant message, from the renderings of message prefixes."""
        assert messages[index].role == "assistant", f"message {index} is not the agent's"
        chat = self._chat(messages[:index], generation=True)
        done = self._apply(messages[: index + 1], generation=False)
        if not full.text.startswith(done):
            raise TemplateError(_fault(index, "changes once later messages follow"))
        is_prefix = done.startswith(chat.text)
        first = self._encoder.prefix_length(chat, full, tokens) if is_prefix else None
        if first is None:
            raise TemplateError(_fault(index, "does not begin with the tokens of its prompt"))
        last = tokens.first_from(len(done))
        ends = (i + 1 for i in reversed(range(first, last)) if tokens.ids[i] == self.end_id)
        end = next(ends, None)
        if end is None:
            raise TemplateError(_fault(index, "does not end with its end-of-turn token"))
        return range(first, end)

    def _cuts(
        self, messages: Sequence[Message], spans: Iterable[Span], text: str
    ) -> dict[tuple[int, int], int]:
        """Where the span edges inside contents stand in the rendered text.

        A mark is put at each edge and looked up after rendering, because a template may strip
        contents, so that their offset is not known otherwise.
        """
        edges = sorted({(s.message, edge) for s in spans for edge in (s.start, s.stop) if edge})
        if not edges:
            return {}
        check_free(text)
        marked = list(messages)
        for index, edge in reversed(edges):
            content = marked[index].content
            marked[index] = replace(marked[index], content=content[:edge] + MARK + content[edge:])
        rendered = self._apply(marked, generation=False)
        places = [place for place, char in enumerate(rendered) if char == MARK]
        if rendered.replace(MARK, "") != text or len(places) != len(edges):
            raise TemplateError(_fault(edges[0][0], "is not its content word for word"))
        return dict(zip(edges, (place - num for num, place in enumerate(places)), strict=True))

    def _chat(self, messages: Sequence[Message], *, generation: bool) -> Chat:
        text = self._apply(messages, generation=generation)
        find = self._encoder.specials
        if not any(find.search(message.content) for message in messages):
            return Chat(text, text)
        check_free(text)
        hidden = self._apply(
            [replace(m, content=find.sub(blot, m.content)) for m in messages],
            generation=generation,
        )
        same = len(hidden) == len(text)
        if not same or any(h not in (MARK, t) for h, t in zip(hidden, text, strict=True)):
            raise TemplateError(
                "chat template: it reads special tokens inside message contents; give a tokenizer"
                " whose template leaves contents alone"
            )
        return Chat(text, hidden)

    def _apply(self, messages: Sequence[Message], *, generation: bool) -> str:
        has_system = any(message.role == "system" for message in messages)
        hint = " (student.system: fold puts the system text into the first question)"
        refusal = f"chat template: it refuses the conversation{hint if has_system else ''}"
        with boundary(TemplateError, refusal):
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": m.role, "content": m.content} for m in messages],
                    tokenize=False,
                    add_generation_prompt=generation,
                )
            )


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render an episode of two turns, so that a template that cannot be masked shows at once.

    Raises:
        ConfigError: see `Renderer`; or the template writes today's date.
        TemplateError: see `Renderer.render_example`.
    """
    refuse_today(tokenizer.get_chat_template())
    answer = "Thought: I look around.\nAction: look"
    contents = ["Act in this world.", "You are in a room.", answer, "You see a desk.", answer]
    roles = ["system", *["user", "assistant"] * 2]
    messages = [Message(role=r, content=c) for r, c in zip(roles, contents, strict=True)]
    Renderer(tokenizer, sys.maxsize).render_example(messages, [Span(message=2), Span(message=4)])


def _mask(
    tokens: Tokens,
    spans: Iterable[Span],
    turns: Mapping[int, range],
    cuts: Mapping[tuple[int, int], int],
) -> tuple[bool, ...]:
    mask = [False] * len(tokens.ids)
    for span in spans:
        first, last = turns[span.message].start, turns[span.message].stop
        if span.start:
            first = tokens.first_from(cuts[span.message, span.start])
        if span.stop:
            last = tokens.num_until(cuts[span.message, span.stop])
        if span.stop != 0:
            mask[first:last] = [True] * (last - first)
    return tuple(mask)


def _fault(index: int, what: str) -> str:
    return (
        f"chat template: message {index} (assistant) {what}; use a template that only appends,"
        " keeps every turn as it is (no removal of thoughts) and ends its generation prompt where"
        " no token can merge with the answer: student.chat_template (builtin:chatml for Qwen3), or"
        " student.system: fold where the system text moves"
    )
