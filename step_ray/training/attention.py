"""Attention over packed documents: each attends to itself only, and no mask of T x T is made.

Takes queries, keys and values of one row of documents and where they end, gives their attention. It
is an attention implementation of transformers, made known to it by `register`. What it cannot
compute it refuses; it never computes something else.

Shape suffixes: Q query heads, K key heads, T positions of the row, D size of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DOCUMENTS = "step_ray_documents"
"""Its name in transformers, which makes no mask for a name that it does not know."""
HARMLESS = {
    *("position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    *("cu_seq_lens_k", "max_length_k", "cache_position", "past_key_values", "output_router_logits"),
}
"""Arguments that models hand on and that do not change what attention is."""


class Unsupported(NotImplementedError):
    """The model asks for an attention that this implementation does not compute."""


def register() -> None:
    """Make the implementation known to transformers under the name `DOCUMENTS`."""
    from transformers import AttentionInterface

    AttentionInterface.register(DOCUMENTS, documents_attention)


# torch.compile would trace the documents one by one, and compile again for each number of them and
# each length; what it fuses is before and behind attention
@torch.compiler.disable
def documents_attention(
    module: nn.Module,
    query_1QTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document of a row, in the signature of transformers.

    Args:
        module: the attention layer.
        query_1QTD: queries.
        key_1KTD: keys; K divides Q.
        value_1KTD: values.
        attention_mask: must be None.
        scaling: factor of the scores; None is 1 / sqrt(D).
        dropout: share of the weights that is dropped.
        sliding_window: positions that a token attends to, itself included; None: all before it.
        cu_seq_lens_q: where documents begin and end, from 0 to T, int32.
        max_length_q: tokens of the longest document.
        is_causal: must not be False.
        **others: what the model hands on besides.

    Returns:
        The attention (1, T, Q, D), and None in place of the weights.

    Raises:
        Unsupported: the layer wants something else (a soft cap, sinks, a mask).
    """
    unknown = [name for name, value in others.items() if value is not None and name not in HARMLESS]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if unknown or not causal or attention_mask is not None:
        raise Unsupported(
            f"{type(module).__name__} uses {', '.join(unknown) or 'a mask of its own'}"
        )
    if cu_seq_lens_q is None or max_length_q is None or len(query_1QTD) != 1:
        raise Unsupported(f"{type(module).__name__} does not hand on where documents end")
    if sliding_window is None and _slides(module):
        raise Unsupported(f"{type(module).__name__} does not hand on its sliding window")
    window = None if sliding_window is None or sliding_window >= max_length_q else sliding_window
    heads = _as_computed(query_1QTD, key_1KTD, value_1KTD)
    if _has_varlen_kernel(heads[0]) and not dropout:
        return _varlen(heads, cu_seq_lens_q, max_length_q, scaling, window), None
    sizes = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(sizes, dim=2) for x in heads), strict=True)
    rules = (scaling, dropout, window)
    whole = torch.cat([_one(q, k, v, *rules) for q, k, v in parts], dim=2)
    return whole.transpose(1, 2).contiguous(), None


def _as_computed(*heads: Tensor) -> tuple[Tensor, ...]:
    """In the type of autocast, if it is on: layers may hand on float32 from a norm."""
    kind = heads[0].device.type
    if not torch.is_autocast_enabled(kind):
        return heads
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in heads)


def _slides(module: Any) -> bool:
    """Whether the config says that this layer has a sliding window."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and layer is not None:
        return str(kinds[layer]) == "sliding_attention"
    used = getattr(config, "use_sliding_window", True)
    return bool(used and getattr(config, "sliding_window", None))


def _has_varlen_kernel(query: Tensor) -> bool:
    """Whether torch has flash attention for documents here: a GPU from Ampere on, in half."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(query.device)[0] >= 8


def _varlen(
    heads: tuple[Tensor, ...],
    ends: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x.squeeze(0).transpose(0, 1) for x in heads)
    result: Tensor = varlen_attn(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result.unsqueeze(0)


def _one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """One document; a mask is needed only where it is longer than the window."""
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        every = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = every.tril() & every.triu(1 - window)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
