"""The wrapped model in a process group of one: types of weights, LoRA, faults, compilation."""

import importlib.util
import shutil
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from step_ray.config import ScratchConfig, TrainConfig
from step_ray.errors import ConfigError, RunStateError, StepRayError
from step_ray.training import state as train_state
from step_ray.training.batching import load_examples
from step_ray.training.kernels import check_liger
from step_ray.training.learner import Learner
from step_ray.training.student import new_model, save_student, train_tokenizer

SHAPE = ScratchConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A gloo process group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 0.03M parameters and four examples."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = train_tokenizer(["go to shelf 1"], SHAPE.vocab_size)
    save_student(folder / "model", new_model(tokenizer, SHAPE, max_length=64, seed=0), tokenizer)
    ids = [[7 + (i * k) % 50 for k in range(12)] for i in range(1, 5)]
    columns = {"input_ids": ids, "loss_mask": [[k > 5 for k in range(12)]] * 4}
    types = {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_())}
    (folder / "examples").mkdir()
    table = pa.table(columns, schema=pa.schema(types))
    pq.write_table(table, folder / "examples" / "part-0.parquet")
    return folder


def learner(folder, dtype="float32", **config):
    settings = TrainConfig(learning_rate=0.01, **config)
    init = str(folder / "model")
    return Learner(init=init, dtype=dtype, config=settings, seed=0, device=CPU)


def train(one, folder, lr=0.01):
    """The losses of three steps."""
    examples = load_examples(folder / "examples")
    lines = [one.train_batch(examples, [0, 1, 2, 3], number=n, lr=lr) for n in range(3)]
    return [line["loss"] for line in lines]


def trained_types(one):
    return {p.dtype for p in one.model.parameters() if p.requires_grad}


def test_fsdp2_in_bfloat16_keeps_float32_weights_gradients_and_optimizer(group, folder):
    plain = train(learner(folder), folder)
    one = learner(folder, dtype="bfloat16", strategy="fsdp2", autocast="bfloat16")
    seen = []
    layer = one.model.model.layers[0]
    layer.self_attn.q_proj.register_forward_hook(
        lambda module, args, out: seen.append((module.weight.dtype, out.dtype))
    )
    half = train(one, folder)

    assert isinstance(next(one.model.parameters()), DTensor)
    assert trained_types(one) == {torch.float32}
    assert {s["exp_avg"].dtype for s in one.optimizer.state.values()} == {torch.float32}
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert half == pytest.approx(plain, rel=2e-2)
    assert half[-1] < half[0] - 0.1


def test_fsdp2_trains_a_float32_lora_on_a_bfloat16_base(group, folder):
    one = learner(folder, dtype="bfloat16", strategy="fsdp2", autocast="bfloat16", lora_rank=4)
    losses = train(one, folder, lr=0.05)

    assert trained_types(one) == {torch.float32}
    frozen = {p.dtype for p in one.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert losses[-1] < losses[0] - 0.02


def test_without_autocast_everything_is_of_the_given_type(folder):
    one = learner(folder, dtype="bfloat16")
    assert trained_types(one) == {torch.bfloat16}


def test_activation_checkpointing_changes_no_loss(folder):
    assert train(learner(folder, gradient_checkpointing=True), folder) == train(
        learner(folder), folder
    )


def test_lora_dropout_acts_in_training_only(folder):
    wet, dry = (learner(folder, lora_rank=4, lora_dropout=p) for p in (0.5, 0.0))
    examples = load_examples(folder / "examples")
    assert train(wet, folder, lr=0.05)[1:] != train(dry, folder, lr=0.05)[1:]
    passes = wet.passes(examples, [0, 1])
    assert wet.nll(passes) == wet.nll(passes)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_compiled_layers_train_the_same_keep_their_names_and_compile_once(folder, packing):
    from torch._dynamo.utils import counters

    examples = load_examples(folder / "examples")
    plain, compiled = (learner(folder, packing=packing, compile=yes) for yes in (False, True))
    losses, frames = {}, []
    for name, one in (("plain", plain), ("compiled", compiled)):
        torch.compiler.reset()
        counters.clear()
        losses[name] = []
        for number, batch in enumerate([[0, 1, 2, 3], [0, 1], [1, 2, 3], [0, 3]]):
            line = one.train_batch(examples, batch, number=number, lr=0.01)
            losses[name].append(line["loss"])
            frames.append(counters["frames"]["ok"])

    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    # other numbers of documents, and other lengths of the row, are the same code
    assert frames[:4] == [0] * 4 and frames[4] > 0
    assert len(set(frames[4:])) == 1


def test_kernels_of_liger_are_refused_without_a_gpu_or_the_package():
    with pytest.raises(ValueError, match="liger needs a GPU; set use_gpu: true"):
        TrainConfig(liger=True)
    if importlib.util.find_spec("liger_kernel") is None:
        with pytest.raises(ConfigError, match=r"train\.liger: .* pip install 'step-ray\[liger\]'"):
            check_liger("llama")


def test_kernels_of_liger_are_refused_for_an_architecture_without_them(monkeypatch):
    known = types.SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", known)
    check_liger("llama")
    with pytest.raises(ConfigError, match=r"no kernels for 'gpt2'; set train\.liger=false"):
        check_liger("gpt2")


def test_a_first_loss_that_is_not_finite_is_blamed_on_the_model_not_on_the_rate(folder):
    one = learner(folder)
    with torch.no_grad():
        one.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(
        StepRayError, match=r"^train: loss is \w+ at step 1; look at the weights of"
    ):
        train(one, folder)


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were(folder):
    one = learner(folder)
    before = {name: p.clone() for name, p in one.model.named_parameters()}
    one.model.get_output_embeddings().weight.register_hook(lambda grad: grad * float("inf"))

    with pytest.raises(StepRayError, match=r"^train: the gradient's norm is \w+ at step 1; lower"):
        train(one, folder)

    assert all(torch.equal(p, before[name]) for name, p in one.model.named_parameters())


def test_a_checkpoint_of_another_model_is_refused_in_one_line(group, folder, tmp_path):
    train_state.save(learner(folder), str(tmp_path), 3)
    assert train_state.restore(learner(folder), str(tmp_path)) == 3
    with pytest.raises(RunStateError, match="is damaged or of another training") as caught:
        train_state.restore(learner(folder, lora_rank=4), str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("left", [0.5, 0.0])
def test_a_damaged_checkpoint_is_refused_in_one_short_line(group, folder, tmp_path, name, left):
    train_state.save(learner(folder), str(tmp_path), 3)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(RunStateError, match=r"^checkpoint: .*; delete the folder of") as caught:
        train_state.restore(learner(folder), str(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
