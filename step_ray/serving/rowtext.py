"""The text of one answer while its tokens come: what may be shown, and where a stop text ends it.

Takes token ids one by one, gives text that never changes once it was shown. It knows nothing of
models, batches or requests.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no whole character, or not yet."""
MAX_HELD = 32
"""How often bytes at the end are given time to become a character; so many tokens are none."""


class RowText:
    """Text that grows by tokens.

    Nothing is decoded before somebody asks: for a piece, for the end, or by a stop text. A few
    tokens are decoded at a time, always behind the ones shown last, because some decoders treat the
    first token of a text in a way of its own (SentencePiece strips its space).

    Args:
        decode: tokens -> text, special tokens left out.
        stops: texts that end the answer; they are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = stops
        self._longest_stop = max(map(len, stops), default=0)
        self._ids: list[int] = []
        self._num_context = 0
        self._context = ""
        """Text of the first `_num_context` of `_ids`, which are part of `text` already."""
        self._num_read = 0
        """Tokens of `_ids` that were looked at."""
        self._num_shown = 0
        self._num_held = 0
        self.text = ""
        """All whole characters so far, cut before a stop text."""
        self.is_stopped = False
        """A stop text was found."""

    def push(self, token: int) -> None:
        """Add a token; nothing is added behind a stop text."""
        self._ids.append(token)
        if self._stops:
            self._read()

    def finish(self) -> None:
        """No token follows: bytes that wait for the rest of a character become text as they are."""
        if len(self._ids) > self._num_context:
            self._grow(self._decode(self._ids))
        self._longest_stop = 0  # so that nothing is held back any more

    def take(self) -> str:
        """The text that may be shown and was not taken before.

        What could be the beginning of a stop text is held back until it is known not to be one.
        """
        self._read()
        end = len(self.text) - (0 if self.is_stopped else self._num_uncertain())
        piece = self.text[self._num_shown : end]
        self._num_shown = max(end, self._num_shown)
        return piece

    def _read(self) -> None:
        """Decode what came since the last time, unless it ends inside a character."""
        if len(self._ids) == self._num_read or self.is_stopped:
            return
        self._num_read = len(self._ids)
        self._num_held += 1
        whole = self._decode(self._ids)
        if not whole.endswith(REPLACEMENT) or self._num_held >= MAX_HELD:
            self._grow(whole)

    def _grow(self, whole: str) -> None:
        """Add what the tokens say beyond their context; they are the context of what follows."""
        new = whole[len(self._context) :]
        if not new or self.is_stopped:
            return
        searched = max(0, len(self.text) - self._longest_stop + 1)
        self.text += new
        self._num_held = 0
        self._ids = self._ids[self._num_context :]
        self._num_context = self._num_read = len(self._ids)
        self._context = self._decode(self._ids)
        cuts = [self.text.find(stop, searched) for stop in self._stops]
        found = [cut for cut in cuts if cut >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True

    def _num_uncertain(self) -> int:
        """Characters at the end that a stop text may begin with."""
        for size in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stops):
                return size
        return 0
