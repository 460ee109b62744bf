"""Chat messages -> token ids: the prompt of a rollout, and a training example with its loss mask.

Takes messages and spans of assistant turns, gives ids and masks of equal length. Both come from
one rendering and one encoder, so what is served is what was trained. It decides nothing about what
is trained (dataset.py does), never searches the text for a turn, and never cuts an example.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from step_ray.errors import ConfigError, DataError, TemplateError, boundary
from step_ray.types import Message

_FIRST_NAME = 0xF0000
"""Code points from here on (private use) stand in for special tokens and marks while rendering."""
_MARK = "\U0010fffd"


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


@dataclass(frozen=True, slots=True)
class _Chat:
    """A rendered conversation, and the same with special-token text of its contents blotted out."""

    text: str
    hidden: str

    @property
    def is_plain(self) -> bool:
        """Whether no content spells a special token."""
        return self.hidden == self.text

    def __getitem__(self, part: slice) -> "_Chat":
        return _Chat(self.text[part], self.hidden[part])


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Ids, and the characters `[start, stop)` of the rendered text that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


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
        self._encoder = _Encoder(backend, tokenizer.unk_token_id)
        self._turn_ends = self._encoder.special_ids | {tokenizer.eos_token_id}

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

        A turn runs from the first token after its prompt to its end-of-turn token; what a template
        writes behind that token (ChatML: a newline) is not trained, for generation stops before.
        Without a special token at its end, the turn runs to the end of its rendering. A token that
        reaches over the edge of a span inside a message is not in the span.

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

    def _turn(self, messages: Sequence[Message], index: int, full: _Chat, tokens: _Tokens) -> range:
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
        last = bisect_left(tokens.offsets, len(done), key=_start)
        ends = (i + 1 for i in reversed(range(first, last)) if tokens.ids[i] in self._turn_ends)
        return range(first, next(ends, last))

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
        _check_free(text)
        marked = list(messages)
        for index, edge in reversed(edges):
            content = marked[index].content
            marked[index] = replace(marked[index], content=content[:edge] + _MARK + content[edge:])
        rendered = self._apply(marked, generation=False)
        places = [place for place, char in enumerate(rendered) if char == _MARK]
        if rendered.replace(_MARK, "") != text or len(places) != len(edges):
            raise TemplateError(_fault(edges[0][0], "is not its content word for word"))
        return dict(zip(edges, (place - num for num, place in enumerate(places)), strict=True))

    def _chat(self, messages: Sequence[Message], *, generation: bool) -> _Chat:
        text = self._apply(messages, generation=generation)
        find = self._encoder.specials
        if not any(find.search(message.content) for message in messages):
            return _Chat(text, text)
        _check_free(text)
        hidden = self._apply(
            [replace(m, content=find.sub(_blot, m.content)) for m in messages],
            generation=generation,
        )
        same = len(hidden) == len(text)
        if not same or any(h not in (_MARK, t) for h, t in zip(hidden, text, strict=True)):
            raise TemplateError(
                "chat template: it reads special tokens inside message contents; give a tokenizer"
                " whose template leaves contents alone"
            )
        return _Chat(text, hidden)

    def _apply(self, messages: Sequence[Message], *, generation: bool) -> str:
        with boundary(TemplateError, "chat template: it refuses the conversation"):
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": m.role, "content": m.content} for m in messages],
                    tokenize=False,
                    add_generation_prompt=generation,
                )
            )


class _Encoder:
    """Rendered text -> ids, with special tokens only where the template wrote them.

    The tokenizers library can match special tokens everywhere or nowhere. So when a content spells
    one, a second encoder is used in which each special token goes by a private name of the same
    length: the template's are renamed, those in contents stay the text they are, and every offset
    stays what it was.
    """

    def __init__(self, backend: Tokenizer, unk_id: int | None) -> None:
        self._backend = _bare(backend)
        added = self._backend.get_added_tokens_decoder()
        self._special = {id_: token for id_, token in added.items() if token.special}
        self.special_ids = frozenset(self._special) - {unk_id}
        self._anchors = frozenset(id_ for id_ in self.special_ids if _is_anchor(self._special[id_]))
        texts = sorted((token.content for token in self._special.values()), key=len, reverse=True)
        self.specials = re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")

    def encode(self, chat: _Chat) -> _Tokens:
        """One call of the tokenizer; it adds nothing, for templates write their own BOS."""
        return self._encode_plain(chat) if chat.is_plain else self._encode_renamed(chat)

    def prefix_length(self, part: _Chat, whole: _Chat, tokens: _Tokens) -> int | None:
        """How many tokens `part` has, if they are the first of `tokens`; None if they are not.

        Only what follows the last special token inside `part` is encoded: a tokenizer cuts the text
        at special tokens before anything else and encodes the pieces one by one, so what comes
        before is the same in both. `encode(part)` would give the same answer in quadratic time.

        Args:
            part: its text is a prefix of that of `whole`.
            whole: the conversation.
            tokens: `encode(whole)`.
        """
        encode = self._encode_plain if part.is_plain else self._encode_renamed
        anchor = bisect_right(tokens.offsets, len(part.text), key=_stop) - 1
        while anchor >= 0 and tokens.ids[anchor] not in self._anchors:
            anchor -= 1
        if anchor < 0 or part.is_plain != whole.is_plain or part != whole[: len(part.text)]:
            anchor, rest = 0, part
        else:
            rest = part[tokens.offsets[anchor][0] :]
        ids = encode(rest).ids
        end = anchor + len(ids)
        return end if tokens.ids[anchor:end] == ids else None

    def _encode_plain(self, chat: _Chat) -> _Tokens:
        encoding = self._backend.encode(chat.text, add_special_tokens=False)
        return _Tokens(encoding.ids, encoding.offsets)

    def _encode_renamed(self, chat: _Chat) -> _Tokens:
        """`encode` with the second encoder; the same ids where there is nothing to keep apart."""
        encoding = self._renamed.encode(self._rename(chat), add_special_tokens=False)
        if not self.special_ids.isdisjoint(encoding.ids):
            raise TemplateError(
                "tokenizer: it has no ordinary tokens for a special token's text inside a message;"
                " use another tokenizer or clean the observations"
            )
        return _Tokens([self._real.get(id_, id_) for id_ in encoding.ids], encoding.offsets)

    @cached_property
    def _names(self) -> dict[str, str]:
        """Text of a special token -> its private name."""
        texts = (token.content for token in self._special.values())
        return {text: chr(_FIRST_NAME + num) * len(text) for num, text in enumerate(texts)}

    @cached_property
    def _renamed(self) -> Tokenizer:
        """The tokenizer with private names beside the special tokens, which it does not match."""
        tokenizer = _bare(self._backend)
        tokenizer.encode_special_tokens = True
        tokenizer.add_tokens(
            [
                AddedToken(
                    self._names[token.content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=False,
                )
                for token in self._special.values()
            ]
        )
        return tokenizer

    @cached_property
    def _real(self) -> dict[int, int]:
        """Id of a private name -> id of the special token."""
        real = {self._names[token.content]: id_ for id_, token in self._special.items()}
        added = self._renamed.get_added_tokens_decoder()
        return {id_: real[token.content] for id_, token in added.items() if token.content in real}

    def _rename(self, chat: _Chat) -> str:
        renamed = self.specials.sub(lambda match: self._names[match[0]], chat.hidden)
        pairs = zip(renamed, chat.text, strict=True)
        return "".join(text if name == _MARK else name for name, text in pairs)


def _is_anchor(token: AddedToken) -> bool:
    """Whether a special token is found by its own text alone, whatever stands around it."""
    return not (token.lstrip or token.rstrip or token.single_word or token.normalized)


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that neither truncates nor pads, and whose offsets keep their white space.

    The post-processor is dropped: it adds special tokens, which we never ask for, and trims.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = None
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = False
    return copy


def _mask(
    tokens: _Tokens,
    spans: Iterable[Span],
    turns: Mapping[int, range],
    cuts: Mapping[tuple[int, int], int],
) -> tuple[bool, ...]:
    mask = [False] * len(tokens.ids)
    for span in spans:
        first, last = turns[span.message].start, turns[span.message].stop
        if span.start:
            first = bisect_left(tokens.offsets, cuts[span.message, span.start], key=_start)
        if span.stop:
            last = bisect_right(tokens.offsets, cuts[span.message, span.stop], key=_stop)
        if span.stop != 0:
            mask[first:last] = [True] * (last - first)
    return tuple(mask)


def _start(offset: tuple[int, int]) -> int:
    return offset[0]


def _stop(offset: tuple[int, int]) -> int:
    return offset[1]


def _blot(match: re.Match[str]) -> str:
    return _MARK * len(match[0])


def _check_free(text: str) -> None:
    """Refuse text with the private-use characters that stand in for special tokens and marks."""
    found = next((char for char in text if ord(char) >= _FIRST_NAME), None)
    if found:
        raise DataError(f"message: private-use character U+{ord(found):X}; remove it from the text")


def _fault(index: int, what: str) -> str:
    return (
        f"chat template: message {index} (assistant) {what}; use a tokenizer whose chat_template"
        " only appends, keeps every turn as it is (no removal of thoughts) and ends its generation"
        " prompt where no token can merge with the answer"
    )
