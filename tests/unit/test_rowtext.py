"""Text that is shown while tokens come: no half character, no stop text, nothing taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from step_ray.serving.rowtext import MAX_HELD, RowText
from step_ray.training.student import train_tokenizer


def by_words(words):
    """A decoder of tokens that are words."""
    return lambda ids: "".join(words[id_] for id_ in ids)


def by_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def sentencepiece():
    """Llama's decoder: a space before the first word is stripped, bytes stand alone."""
    words = ["▁a", "▁b", "c", *(f"<0x{byte:02X}>" for byte in "é你".encode())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer


def run(decode, ids, stops=()):
    """Pieces as they are shown, the last one after the end, and the whole text."""
    row, pieces = RowText(decode, stops), []
    for id_ in ids:
        row.push(id_)
        pieces.append(row.take())
        if row.is_stopped:
            break
    row.finish()
    return [*pieces, row.take()], row.text


def test_each_token_is_shown_at_once():
    assert run(by_words(["a", "b", " c"]), [0, 1, 2]) == (["a", "b", " c", ""], "ab c")


def test_a_character_of_several_tokens_is_shown_when_it_is_whole():
    pieces, text = run(by_bytes, list("né你".encode()))
    assert pieces == ["n", "", "é", "", "", "你", ""]
    assert text == "né你"


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    assert run(by_bytes, [ord("a"), 0xE4]) == (["a", "", "\N{REPLACEMENT CHARACTER}"], "a\ufffd")


def test_bytes_that_cannot_become_a_character_wait_no_longer_than_32_tokens():
    pieces, _ = run(by_bytes, [0xE4] * (MAX_HELD + 1))
    assert [len(piece) for piece in pieces] == [0] * (MAX_HELD - 1) + [MAX_HELD, 0, 1]


def test_the_space_of_a_later_word_is_kept_and_that_of_the_first_is_not():
    decode = sentencepiece().decode
    pieces, text = run(decode, [0, 1, 2, 3, 4, 1, 5, 6, 7])
    assert pieces == ["a", " b", "c", "", "é", " b", "", "", "你", ""]
    assert text == decode([0, 1, 2, 3, 4, 1, 5, 6, 7])


def test_what_may_be_a_stop_text_waits_until_it_is_none():
    words = by_words(["x", "<", "s", "t", ">", "y"])
    assert run(words, [0, 1, 2, 5], ["<st>"]) == (["x", "", "", "<sy", ""], "x<sy")


def test_a_stop_text_and_what_follows_are_never_shown():
    words = by_words(["x", "<s", "t>z"])
    assert run(words, [0, 1, 2, 0], ["<st>"]) == (["x", "", "", ""], "x")


def test_the_first_of_several_stop_texts_ends_the_text():
    assert run(by_words(["a.b.c"]), [0], ["c", "b", ".b"])[1] == "a"


def test_half_a_stop_text_at_the_end_is_text():
    assert run(by_words(["x", "<s"]), [0, 1], ["<st>"]) == (["x", "", "<s"], "x<s")


TOKENIZER = train_tokenizer(["Thought: I look around.\nAction: go to desk 1"], 320)
TEXTS = st.text(st.sampled_from("ab .\nné你🙂<|>"), max_size=30)


def decode_trained(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(st.lists(st.integers(0, 319), max_size=40), st.lists(TEXTS.filter(bool), max_size=3))
def test_pieces_make_up_the_text_of_all_tokens_up_to_a_stop(ids, stops):
    pieces, text = run(decode_trained, ids, stops)
    whole = decode_trained(ids)
    cuts = [whole.find(stop) for stop in stops if stop in whole]
    assert "".join(pieces) == text
    if not cuts:
        assert text == whole
    else:
        # the first stop that is complete ends it, and that may begin behind a longer one
        assert whole.startswith(text)
        assert any(whole.startswith(stop, len(text)) for stop in stops)
    assert not any(stop in text for stop in stops)


@given(TEXTS, st.data())
def test_valid_text_is_never_shown_with_a_hole(text, data):
    pieces, shown = run(decode_trained, TOKENIZER.encode(text))
    assert shown == text
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("stops", [[], ["b"], ["zz"]])
def test_taking_less_often_gives_the_same_text(stops):
    row = RowText(by_words(["a", "b", "c"]), stops)
    for id_ in (0, 0, 1, 2):
        if not row.is_stopped:
            row.push(id_)
    row.finish()
    assert row.take() == row.text
