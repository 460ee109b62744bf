"""Batched text generation on a Hugging Face causal language model.

Takes prompts as token ids with one `SamplingParams` each, gives one `Generated` each. The rows of a
batch are independent: each has its own length, temperature and random stream, joins between two
tokens of the others and leaves when it is done (continuous batching). Keys and values of past
prompts are kept, so that the next turn of a conversation pays for its new tokens only. It never
renders messages and never cuts a prompt.

Shape suffixes: B rows, T new tokens, V vocabulary.
"""

import itertools
import random
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from step_ray.errors import ConfigError, ContextLengthError
from step_ray.serving.decodegraph import DecodeGraphs
from step_ray.serving.kvcache import BatchCache, Layers, PrefixCache
from step_ray.serving.rowtext import RowText
from step_ray.training.turnend import stop_ids

PREFILL_TOKENS = 2048
"""Most tokens (padding included) of one prompt pass; a single longer prompt goes alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one row is continued."""

    max_tokens: int
    """New tokens at most, the end-of-turn token included."""
    temperature: float = 0.0
    """0: greedy."""
    seed: int | None = None
    """Seed of the row's own random stream; None: unseeded."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that holds this much probability."""
    stop: tuple[str, ...] = ()
    """Texts that end the row; they are not part of its text."""
    ignore_eos: bool = False
    """Go on after the end of the turn, up to `max_tokens`: load tools ask for a fixed length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """The continuation of one prompt."""

    ids: tuple[int, ...]
    """New tokens, the end-of-turn token included where it was produced."""
    text: str
    """The tokens as text without special tokens, cut before a stop text."""
    finish_reason: str
    """`stop` (end-of-turn token or stop text) or `length`."""
    cached_tokens: int
    """Prompt tokens whose keys and values came from an earlier call."""


@dataclass(slots=True, kw_only=True)
class _Row:
    """A prompt in flight; the keys and values of `ids[:-1]` are in the batch cache."""

    ticket: int
    ids: list[int]
    """The prompt and what was generated so far."""
    num_prompt: int
    num_cached: int
    prefix: Layers
    """Remembered keys and values, until they are loaded."""
    params: SamplingParams
    rng: random.Random
    text: RowText
    finish_reason: str = ""

    @property
    def num_fed(self) -> int:
        """Tokens whose keys and values are known once the row takes part in a decode step."""
        return len(self.ids) - 1


class BatchGenerator:
    """Generates for a batch of prompts; not thread-safe.

    Use `generate` for a whole batch, or `add` and `step` in turn where prompts come and go.

    Args:
        model: Full-attention causal language model; it is put into eval mode.
        tokenizer: Decodes new tokens; a row ends at the tokens that turnend.py names.
        max_length: Context in tokens, prompt and answer together.
        prefix_cache_mb: MiB for keys and values of past prompts; 0: no reuse.
        record_steps: Decode steps are recorded and replayed (decodegraph.py); None: on a GPU.

    Raises:
        ConfigError: the model has layers without plain full attention.
        TemplateError: the tokenizer's chat template ends no turn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        prefix_cache_mb: int = 256,
        record_steps: bool | None = None,
    ) -> None:
        self.max_length = max_length
        self._model = model.eval()
        self._backend = tokenizer.backend_tokenizer  # decodes without touching up spaces
        self._ends = frozenset(stop_ids(tokenizer, model.generation_config))
        self._cache = BatchCache(_num_full_attention_layers(model))
        self._prefixes = PrefixCache(prefix_cache_mb * 2**20)
        is_recorded = model.device.type == "cuda" if record_steps is None else record_steps
        self._graphs = (
            DecodeGraphs(self._logits, self._cache, model.device) if is_recorded else None
        )
        self._tickets = itertools.count()
        self._active: list[_Row] = []
        """Unfinished rows, which are the first rows of the cache in this order."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[Generated]:
        """Continue every prompt; the answers are in the order of the prompts.

        Raises:
            ContextLengthError: a prompt leaves no room for a new token.
            ValueError: a prompt is empty or `max_tokens` is below 1.
        """
        assert not self._active, "generate: rows of add() are unfinished"
        tickets = self.add(prompts, params)
        results: dict[int, Generated] = {}
        while self._active:
            results.update(self.step())
        return [results[ticket] for ticket in tickets]

    @torch.inference_mode()
    def add(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[int]:
        """Let prompts join the batch, computed up to their last token.

        Returns:
            A ticket per prompt, by which `step` tells the answers apart.

        Raises:
            ContextLengthError, ValueError: see `generate`; then none of them has joined.
        """
        for prompt, wish in zip(prompts, params, strict=True):
            self._check(prompt, wish)
        rows = [self._row(*pair) for pair in zip(prompts, params, strict=True)]
        tickets = [row.ticket for row in rows]
        rows.sort(key=lambda row: row.num_cached - row.num_fed)  # most work first
        first_row = len(self._active)
        self._cache.reserve(first_row + len(rows), max((len(row.ids) for row in rows), default=0))
        for place, row in enumerate(rows, start=first_row):
            self._cache.load(place, row.prefix, row.num_cached)
            row.prefix = []
        self._prefill(first_row, rows)
        self._active += rows
        return tickets

    def drop_all(self) -> None:
        """Forget the unfinished rows, after `add` or `step` failed."""
        self._active.clear()

    def free(self) -> None:
        """Let go what past prompts have left behind; nothing may be unfinished."""
        assert not self._active, "free: rows of add() are unfinished"
        self._prefixes.clear()
        self._cache.free()
        if self._graphs:
            self._graphs.clear()

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Generated]]:
        """Append one token to every row; gives the rows that this finishes, with their tickets."""
        active = self._active
        if not active:
            return []
        tokens_BT = torch.tensor([[row.ids[-1]] for row in active])
        positions_BT = torch.tensor([[row.num_fed] for row in active])
        width = int(positions_BT.max()) + 1
        self._cache.reserve(len(active), width)
        step = self._graphs.logits if self._graphs else self._next_logits
        chosen = choose_tokens(
            step(tokens_BT, positions_BT, width).float(),
            [row.params for row in active],
            [row.rng for row in active],
        )
        for row, token in zip(active, chosen, strict=True):
            row.ids.append(token)
            self._judge(row)
        places = [place for place, row in enumerate(active) if row.finish_reason]
        # from the back, so that the places still to come stay what they are
        return [_answer(self._release(place)) for place in reversed(places)]

    def new_text(self, tickets: Container[int]) -> list[tuple[int, str]]:
        """What unfinished rows have to show since the last call, with their tickets.

        The pieces of a row are the beginning of the text it will have, whatever follows.
        """
        return [(row.ticket, row.text.take()) for row in self._active if row.ticket in tickets]

    @torch.inference_mode()
    def drop(self, tickets: Container[int]) -> None:
        """Take unfinished rows out of the batch; nobody waits for them any more."""
        for place in reversed(range(len(self._active))):
            if self._active[place].ticket in tickets:
                self._release(place)

    def _check(self, prompt: Sequence[int], wish: SamplingParams) -> None:
        if not prompt or wish.max_tokens < 1:
            raise ValueError("generate: a prompt is empty or max_tokens is below 1")
        if len(prompt) >= self.max_length:
            raise ContextLengthError(
                f"max_length: the prompt has {len(prompt)} tokens and leaves no room in "
                f"{self.max_length}; shorten it"
            )

    def _row(self, prompt: Sequence[int], wish: SamplingParams) -> _Row:
        length, prefix = self._prefixes.longest(prompt)
        return _Row(
            ticket=next(self._tickets),
            ids=list(prompt),
            num_prompt=len(prompt),
            num_cached=min(length, len(prompt) - 1),  # the last token is fed to get logits
            prefix=prefix,
            params=wish,
            rng=random.Random(wish.seed),
            text=RowText(self._decode, wish.stop),
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def _prefill(self, first_row: int, rows: list[_Row]) -> None:
        """Compute keys and values of the prompts, all but the last token of each."""
        for offset, group in _prefill_groups(rows):
            size = max(row.num_fed - row.num_cached for row in group)
            starts = torch.tensor([[row.num_cached] for row in group])
            ends = torch.tensor([[row.num_fed] for row in group])
            # padding goes where the prompt's last token is written next, so it is never seen
            positions_BT = torch.minimum(starts + torch.arange(size), ends)
            tokens_BT = torch.zeros_like(positions_BT)
            for i, row in enumerate(group):
                new = row.ids[row.num_cached : -1]
                tokens_BT[i, : len(new)] = torch.tensor(new)
            device = self._model.device
            self._forward(
                first_row + offset,
                tokens_BT.to(device),
                positions_BT.to(device),
                int(positions_BT.max()) + 1,
                self._model.base_model,
            )

    def _next_logits(
        self, tokens_B1: torch.Tensor, positions_B1: torch.Tensor, width: int
    ) -> torch.Tensor:
        device = self._model.device
        return self._logits(tokens_B1.to(device), positions_B1.to(device), width)

    def _logits(
        self, tokens_B1: torch.Tensor, positions_B1: torch.Tensor, width: int
    ) -> torch.Tensor:
        """Logits of the first rows; everything is on the device, and nothing waits for it."""
        logits: torch.Tensor = self._forward(0, tokens_B1, positions_B1, width, self._model).logits
        return logits[:, -1]

    def _forward(
        self,
        first_row: int,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        width: int,
        module: Any,
    ) -> Any:
        self._cache.aim(first_row, positions_BT, width)
        columns = torch.arange(width, device=positions_BT.device)
        hidden = columns > positions_BT[:, None, :, None]
        # an additive mask: a boolean one is converted anew in every layer
        mask = torch.zeros(hidden.shape, dtype=self._model.dtype, device=hidden.device)
        return module(
            input_ids=tokens_BT,
            attention_mask=mask.masked_fill_(hidden, float("-inf")),
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
        )

    def _judge(self, row: _Row) -> None:
        """Read a row's newest token, and set the finish reason if it ends the row."""
        token, num_new = row.ids[-1], len(row.ids) - row.num_prompt
        if token in self._ends and not row.params.ignore_eos:
            row.finish_reason = "stop"
        else:
            row.text.push(token)
            if num_new == row.params.max_tokens or len(row.ids) == self.max_length:
                row.finish_reason = "length"
        if row.finish_reason:
            row.text.finish()
        if row.text.is_stopped:
            row.finish_reason = "stop"

    def _release(self, place: int) -> _Row:
        """Remember a row that leaves the batch, and let the last active one take its place."""
        row, last = self._active[place], self._active.pop()
        if self._prefixes.max_bytes:
            self._prefixes.add(row.ids[:-1], self._cache.copy_row(place, row.num_fed))
        if last is not row:
            self._cache.move(len(self._active), place, last.num_fed)
            self._active[place] = last
        return row


def _answer(row: _Row) -> tuple[int, Generated]:
    """A finished row with its ticket."""
    answer = Generated(
        ids=tuple(row.ids[row.num_prompt :]),
        text=row.text.text,
        finish_reason=row.finish_reason,
        cached_tokens=row.num_cached,
    )
    return row.ticket, answer


def choose_tokens(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], rngs: Sequence[random.Random]
) -> list[int]:
    """One token per row: the most likely one, or a draw from the row's own random stream.

    A draw inverts the cumulative distribution (in token order) at one uniform number per row, so
    it depends on nothing but the row's logits, parameters and stream. All of it happens where the
    logits are.
    """
    chosen: list[int] = logits_BV.argmax(dim=-1).tolist()
    hot = [i for i, wish in enumerate(params) if wish.temperature > 0]
    if not hot:
        return chosen
    double = partial(torch.tensor, dtype=torch.float64, device=logits_BV.device)
    temperatures = double([params[i].temperature for i in hot])
    top_p = double([params[i].top_p for i in hot])
    uniform = double([rngs[i].random() for i in hot])
    probs_BV = torch.softmax(logits_BV[hot].double() / temperatures[:, None], dim=-1)
    cut = top_p < 1
    if cut.any():
        probs_BV[cut] = _nucleus(probs_BV[cut], top_p[cut])
    cumulative_BV = probs_BV.cumsum(dim=-1)
    threshold = uniform * cumulative_BV[:, -1]
    drawn = (cumulative_BV <= threshold[:, None]).sum(dim=-1).tolist()
    for i, token in zip(hot, drawn, strict=True):
        chosen[i] = token
    return chosen


def _nucleus(probs_BV: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Probabilities with zeros outside the smallest set that holds `top_p` (arXiv 1904.09751)."""
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    kept_BV = torch.where(before_BV < top_p[:, None], sorted_BV, 0.0)
    kept_BV[:, 0] = sorted_BV[:, 0]  # top_p 0 keeps the most likely token
    return torch.zeros_like(probs_BV).scatter(-1, order_BV, kept_BV)


def _prefill_groups(rows: list[_Row]) -> Iterator[tuple[int, list[_Row]]]:
    """Neighbouring rows that fit one prompt pass together, with the offset of the first.

    Rows come with the most work first; a group takes no row with less than half of its first
    one's work, so at most half of a pass is padding.
    """
    first = 0
    while first < len(rows):
        most = rows[first].num_fed - rows[first].num_cached
        if most == 0:
            return
        end = first + 1
        while (
            end < len(rows)
            and (end + 1 - first) * most <= PREFILL_TOKENS
            and 2 * (rows[end].num_fed - rows[end].num_cached) >= most
        ):
            end += 1
        yield first, rows[first:end]
        first = end


def _num_full_attention_layers(model: PreTrainedModel) -> int:
    layers = DynamicCache(config=model.config).layers
    odd = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if odd or not layers:
        raise ConfigError(
            f"serve.engine: 'transformers' serves full-attention models only, this one has "
            f"{odd or 'no'} cache layers; use 'vllm'"
        )
    return len(layers)
