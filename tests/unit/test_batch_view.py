"""What is shown of a forward pass is what the model and the loss get of it."""

import json

import pytest

from step_ray.config import TrainConfig
from step_ray.dataset import Example, write_examples
from step_ray.training.batch_view import Pass, first_epoch, view_pass
from step_ray.training.batching import load_examples
from step_ray.training.student import train_tokenizer

TOKENIZER = train_tokenizer(["go take"], 300)
G, T = TOKENIZER.encode("go")[0], TOKENIZER.encode("take")[0]
END = TOKENIZER.eos_token_id


def example(name, ids, trained, errors):
    return Example(
        trajectory_id=name,
        source="self_reflected",
        input_ids=tuple(ids),
        loss_mask=tuple(sign == "+" for sign in trained),
        error_mask=tuple(sign == "-" for sign in errors),
    )


EXAMPLES = [
    example("a", [2, G, END, T, END], "...++", ".--.."),
    example("b", [2, T, END], ".++", "..."),
    example("c", [2, G, T, END], "+..+", "...."),  # a first token has no prediction
]


@pytest.fixture
def folder(tmp_path):
    write_examples(tmp_path / "run" / "datasets" / "step", EXAMPLES)
    return tmp_path / "run" / "datasets" / "step"


def shown(folder, indices, packed):
    one = Pass(step=2, rank=1, number=0, indices=indices)
    examples = load_examples(folder)
    return list(view_pass(one, examples, EXAMPLES, TOKENIZER, packed=packed))


def coloured(text):
    return [(text.plain[s.start : s.end], str(s.style)) for s in text.spans]


def test_each_document_of_a_packed_row_has_its_place_and_colours(folder):
    head, line_a, text_a, line_c, text_c = shown(folder, (0, 2), packed=True)

    assert head.plain == (
        "step 2, rank 1, pass 0: packed, 2 documents in 1 x 9 positions, 3 tokens trained,"
        " 0 of padding"
    )
    assert line_a.plain.strip() == (
        "example 0, a (self_reflected): positions 0 to 4, 2 trained, 2 masked"
    )
    assert coloured(text_a) == [
        ("<|bos|>", "dim"),
        ("g" if TOKENIZER.decode([G]) == "g" else "go", "dim red"),
        ("<|end|>", "dim reverse red"),
        (TOKENIZER.decode([T]), "green"),
        ("<|end|>", "bold reverse green"),
    ]
    assert line_c.plain.strip() == (
        "example 2, c (self_reflected): positions 5 to 8, 1 trained, 0 masked"
    )
    assert coloured(text_c)[0] == (TOKENIZER.decode([2, G, T]), "dim")


def test_padding_is_counted_and_not_shown(folder):
    head, _, text_a, line_b, text_b = shown(folder, (0, 1), packed=False)

    assert "padded, 2 documents in 2 x 5 positions, 4 tokens trained, 2 of padding" in head.plain
    assert line_b.plain.strip().endswith("3 tokens, 2 trained, 0 masked")
    assert text_b.plain == TOKENIZER.decode([2, T, END])
    assert text_a.plain == TOKENIZER.decode([2, G, END, T, END])


@pytest.mark.parametrize("packed", [False, True])
def test_the_first_epoch_has_every_example_once(folder, packed):
    config = TrainConfig(num_workers=2, batch_tokens=64, micro_batch_tokens=64)

    passes = first_epoch(load_examples(folder), config, seed=0, packed=packed)

    assert sorted(i for one in passes for i in one.indices) == [0, 1, 2]
    assert [(one.step, one.rank, one.number) for one in passes] == [(0, 0, 0), (0, 1, 0)]


def write_run(folder, **train):
    TOKENIZER.save_pretrained(folder / "tokenizer")
    config = {"name": "run", "train": {"batch_tokens": 64, "micro_batch_tokens": 64} | train}
    (folder.parent.parent / "run.json").write_text(json.dumps({"config": config}))


@pytest.mark.parametrize(
    ("train", "layout", "why"),
    [
        ({}, "", "not trained yet, shown packed\n"),
        ({}, "batches are padded, attention eager (no)", "as trained: batches are padded"),
        ({}, "batches are packed, attention flex (yes)", "as trained: batches are packed"),
        ({"packing": "padded"}, "", "train.packing: padded"),
    ],
)
def test_show_mask_takes_settings_layout_and_tokenizer_from_the_run(
    folder, step_ray, train, layout, why
):
    write_run(folder, **train)
    if layout:
        (folder.parent.parent / "train" / "step").mkdir(parents=True)
        starts = folder.parent.parent / "train" / "step" / "starts.jsonl"
        starts.write_text(json.dumps({"step": 0, "layout": layout}) + "\n")

    code, out, lines = step_ray("show", folder, "--mask")

    out = " ".join(out.split()) + "\n"
    assert (code, lines) == (0, [])
    assert "forward pass 0 of 1 in the first epoch" in out and why.strip() in out
    assert ("packed, 3 documents in 1 x 12" in out) == ("padded" not in why)
    assert "step 0, rank 0, pass 0" in out and "5 tokens trained" in out


def test_show_reads_examples_with_their_own_tokenizer_before_any_training(folder, step_ray):
    write_run(folder)

    code, out, _ = step_ray("show", folder, "--index", "1")

    assert code == 0
    assert "b (self_reflected)" in out and "2 of 3 tokens trained, 0 masked" in out


def test_examples_without_any_tokenizer_ask_for_one(folder, step_ray):
    code, out, (line,) = step_ray("show", folder)

    assert (code, out) == (2, "")
    assert line.endswith("; name one with --model")


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("--mask", "--index", "7"), "--index 7, but 1 of 1 records match"),
        (("--mask", "--id", "a"), "choose it by --index"),
    ],
)
def test_a_pass_that_is_not_there(folder, step_ray, args, what):
    write_run(folder)

    code, _, (line,) = step_ray("show", folder, *args)

    assert (code, what in line) == (2, True)


def test_a_folder_of_trajectories_has_no_passes(tmp_path, step_ray):
    code, _, (line,) = step_ray("show", tmp_path, "--mask")

    assert code == 2
    assert "holds no training examples; name datasets/ARM" in line
