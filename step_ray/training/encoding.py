"""Rendered chat text -> token ids, with control tokens only where the template wrote them.

Takes the text that a chat template made and says which of it came from message contents, gives ids
with the characters that each stands for. It renders nothing and knows no turns (render.py).
"""

import json
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property

from tokenizers import AddedToken, Tokenizer

from step_ray.errors import DataError, TemplateError

FIRST_NAME = 0xF0000
"""Code points from here on (private use) stand in for control tokens and marks while rendering."""
MARK = "\U0010fffd"


@dataclass(frozen=True, slots=True)
class Chat:
    """A rendered conversation, and the same with control-token text of its contents blotted out."""

    text: str
    hidden: str

    @property
    def is_plain(self) -> bool:
        """Whether no content spells a special token."""
        return self.hidden == self.text

    def __getitem__(self, part: slice) -> "Chat":
        return Chat(self.text[part], self.hidden[part])


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids, and the characters `[start, stop)` of the rendered text that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def first_from(self, place: int) -> int:
        """Index of the first token that starts at a character or behind it."""
        return bisect_left(self.offsets, place, key=lambda offset: offset[0])

    def num_until(self, place: int) -> int:
        """How many tokens end at a character or before it."""
        return bisect_right(self.offsets, place, key=lambda offset: offset[1])


class Encoder:
    """Rendered text -> ids, with special tokens only where the template wrote them.

    The tokenizers library can match special tokens everywhere or nowhere. So when a content spells
    one, a second encoder is used in which each special token goes by a private name of the same
    length: the template's are renamed, those in contents stay the text they are, and every offset
    stays what it was.

    Args:
        backend: the tokenizer; it is copied.
        unk_id: its token for what it does not know, which stands for ordinary text; None: none.
        end_id: what ends a turn, special here even where the tokenizer does not mark it so.
    """

    def __init__(self, backend: Tokenizer, unk_id: int | None, end_id: int) -> None:
        self._backend = _with_special(_bare(backend), end_id)
        added = self._backend.get_added_tokens_decoder()
        self._special = {id_: token for id_, token in added.items() if token.special}
        self.special_ids = frozenset(self._special) - {unk_id}
        self._anchors = frozenset(id_ for id_ in self.special_ids if _is_anchor(self._special[id_]))
        texts = sorted((token.content for token in self._special.values()), key=len, reverse=True)
        self.specials = re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")

    def encode(self, chat: Chat) -> Tokens:
        """One call of the tokenizer; it adds nothing, for templates write their own BOS."""
        return self._encode_plain(chat) if chat.is_plain else self._encode_renamed(chat)

    def prefix_length(self, part: Chat, whole: Chat, tokens: Tokens) -> int | None:
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
        anchor = tokens.num_until(len(part.text)) - 1
        while anchor >= 0 and tokens.ids[anchor] not in self._anchors:
            anchor -= 1
        if anchor < 0 or part.is_plain != whole.is_plain or part != whole[: len(part.text)]:
            anchor, rest = 0, part
        else:
            rest = part[tokens.offsets[anchor][0] :]
        ids = encode(rest).ids
        end = anchor + len(ids)
        return end if tokens.ids[anchor:end] == ids else None

    def _encode_plain(self, chat: Chat) -> Tokens:
        encoding = self._backend.encode(chat.text, add_special_tokens=False)
        return Tokens(encoding.ids, encoding.offsets)

    def _encode_renamed(self, chat: Chat) -> Tokens:
        """`encode` with the second encoder; the same ids where there is nothing to keep apart."""
        encoding = self._renamed.encode(self._rename(chat), add_special_tokens=False)
        if not self.special_ids.isdisjoint(encoding.ids):
            raise TemplateError(
                "tokenizer: it has no ordinary tokens for a special token's text inside a message;"
                " use another tokenizer or clean the observations"
            )
        return Tokens([self._real.get(id_, id_) for id_ in encoding.ids], encoding.offsets)

    @cached_property
    def _names(self) -> dict[str, str]:
        """Text of a special token -> its private name."""
        texts = (token.content for token in self._special.values())
        return {text: chr(FIRST_NAME + num) * len(text) for num, text in enumerate(texts)}

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

    def _rename(self, chat: Chat) -> str:
        renamed = self.specials.sub(lambda match: self._names[match[0]], chat.hidden)
        pairs = zip(renamed, chat.text, strict=True)
        return "".join(text if name == MARK else name for name, text in pairs)


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


def _with_special(tokenizer: Tokenizer, id_: int) -> Tokenizer:
    """The tokenizer with one added token marked as special."""
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["id"] == id_
    return Tokenizer.from_str(json.dumps(state))


def blot(match: re.Match[str]) -> str:
    """As many marks as a special token has characters."""
    return MARK * len(match[0])


def check_free(text: str) -> None:
    """Refuse text with the private-use characters that stand in for special tokens and marks."""
    found = next((char for char in text if ord(char) >= FIRST_NAME), None)
    if found:
        raise DataError(f"message: private-use character U+{ord(found):X}; remove it from the text")
