"""Attention over documents: what it computes, and what it refuses."""

import types

import pytest
import torch
from torch.nn import functional as F

from step_ray.training.attention import Unsupported, documents_attention

ENDS = {"cu_seq_lens_q": torch.tensor([0, 5, 8], dtype=torch.int32), "max_length_q": 5}
LAYER = types.SimpleNamespace(is_causal=True)


def heads():
    draw = torch.Generator().manual_seed(0)
    sizes = ((1, 4, 8, 8), (1, 2, 8, 8), (1, 2, 8, 8))
    return [torch.randn(*size, generator=draw) for size in sizes]


@pytest.mark.parametrize("window", [None, 2, 5])
def test_it_is_attention_with_the_exact_mask(window):
    query, key, value = heads()
    document = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    back = torch.arange(8)[:, None] - torch.arange(8)[None]
    mask = (document[:, None] == document[None]) & (back >= 0) & (back < (window or 99))
    keys, values = (x.repeat_interleave(2, dim=1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
    result, weights = documents_attention(
        LAYER, query, key, value, None, scaling=0.3, sliding_window=window, **ENDS
    )
    torch.testing.assert_close(result, expected.transpose(1, 2))
    assert weights is None


@pytest.mark.parametrize(
    ("others", "complaint"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"is_causal": False}, "a mask of its own"),
        ({"cu_seq_lens_q": None}, "where documents end"),
    ],
)
def test_what_it_cannot_compute_it_refuses(others, complaint):
    with pytest.raises(Unsupported, match=complaint):
        documents_attention(LAYER, *heads(), None, **{**ENDS, **others})


@pytest.mark.parametrize(
    "config",
    [
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
        {"sliding_window": 4},
    ],
)
def test_a_layer_that_does_not_hand_on_its_sliding_window_is_refused(config):
    layer = types.SimpleNamespace(config=types.SimpleNamespace(**config), layer_idx=1)
    with pytest.raises(Unsupported, match="sliding window"):
        documents_attention(layer, *heads(), None, **ENDS)


def test_a_layer_of_full_attention_beside_sliding_ones_is_accepted():
    config = types.SimpleNamespace(
        layer_types=["full_attention", "sliding_attention"], sliding_window=4
    )
    layer = types.SimpleNamespace(config=config, layer_idx=0)
    result, _ = documents_attention(layer, *heads(), None, **ENDS)
    assert result.shape == (1, 8, 4, 8)
