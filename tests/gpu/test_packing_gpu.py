"""Packing on a GPU: torch's flash attention for documents, and flash attention of transformers."""

import pytest
import torch
import transformers
from transformers.utils import is_flash_attn_2_available

from step_ray.training import attention
from step_ray.training.attention import documents_attention
from step_ray.training.batching import collate, packed_inputs
from step_ray.training.headloss import find_head, trained_nll
from step_ray.training.layout import choose_layout
from tests.tiny_models import SHAPE, VOCAB, make_examples, new_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LENGTHS = (90, 6, 1, 200)
CONFIG = {**SHAPE, "hidden_size": 128, "max_position_embeddings": 512}


@pytest.mark.parametrize("window", [None, 16])
def test_the_kernel_for_documents_is_attention_by_document(monkeypatch, window):
    torch.manual_seed(0)
    sizes = ((1, 4, sum(LENGTHS), 32), (1, 2, sum(LENGTHS), 32), (1, 2, sum(LENGTHS), 32))
    heads = [torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in sizes]
    ends = packed_inputs(torch.tensor(LENGTHS))
    given = {"cu_seq_lens_q": ends["cu_seq_lens_q"].cuda(), "max_length_q": max(LENGTHS)}
    layer = torch.nn.Identity()
    assert attention._has_varlen_kernel(heads[0])
    fast, _ = documents_attention(layer, *heads, None, sliding_window=window, **given)
    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda query: False)
    slow, _ = documents_attention(layer, *heads, None, sliding_window=window, **given)
    torch.testing.assert_close(fast, slow, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "implementation",
    [
        "sdpa",
        pytest.param(
            "flash_attention_2",
            marks=pytest.mark.skipif(
                not is_flash_attn_2_available(), reason="flash-attn is not installed"
            ),
        ),
        "flex_attention",
    ],
)
@pytest.mark.parametrize("window", [None, 16])
def test_packed_and_padded_gradients_agree_in_bfloat16(implementation, window):
    shape = transformers.MistralConfig(**CONFIG, sliding_window=window)
    model = new_model(shape).to("cuda", torch.bfloat16)
    device = torch.device("cuda")
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (n,), generator=draw).tolist() for n in LENGTHS]
    examples = make_examples([(row, [i % 3 == 0 for i in range(len(row))]) for row in ids])
    padded = gradients(model, collate(examples, range(4)).to(device))
    model.set_attn_implementation(implementation)
    assert choose_layout(model, model, "packed", device=device).packed
    packed = gradients(model, collate(examples, range(4), packed=True).to(device))
    for one, other in zip(packed, padded, strict=True):
        assert (one - other).norm() <= 5e-2 * other.norm()


def gradients(model, batch):
    model.zero_grad()
    head = find_head(model, chunk=50, device=torch.device("cuda"))
    trained_nll(model, head, batch.inputs, batch.positions_N, batch.targets_N).backward()
    return [p.grad.float().clone() for p in model.parameters()]
