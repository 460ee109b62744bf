"""WebShop's rules: products, search terms, pages, actions, reward; shops of a few lines by hand."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step_ray.envs.webshop import pages
from step_ray.envs.webshop.analysis import analyse
from step_ray.envs.webshop.catalogue import Catalogue, build_catalogue
from step_ray.envs.webshop.goals import draw_limit, list_goals
from step_ray.envs.webshop.products import parse_price, parse_product, stream_records
from step_ray.envs.webshop.reward import (
    Goal,
    count_option_hits,
    nouns,
    score,
    similar,
    title_similarity,
    type_factor,
)
from step_ray.envs.webshop.search import stored_length
from step_ray.envs.webshop.session import Place, Session, parse_action
from step_ray.errors import DataError, EnvError

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine makes no test fail."""
SHORT = st.text(max_size=8)
RECORD = {
    "asin": "B000000001",
    "name": "Acme Red Shirt",
    "full_description": "A shirt of cotton.",
    "small_description": ["Machine wash.", "Soft."],
    "pricing": "$10.5",
    "images": ["x.jpg"],
    "category": "fashion",
    "query": "Shirts ",
    "product_category": "Clothing › Men › Shirts",
    "customization_options": {
        "Size": [{"value": " Small "}, {"value": "X-Large/Tall"}],
        "Color": [{"value": "Dark Red"}, {"value": "Blue"}],
        "Fit": None,
    },
}
NOTE = {
    "attributes": ["machine wash", "soft"],
    "instruction": "Find me machine wash shirts",
    "instruction_attributes": ["machine wash"],
}


def record(number=1, **fields):
    return RECORD | {"asin": f"B{number:09}"} | fields


def product(number=1, note=NOTE, **fields):
    return parse_product(record(number, **fields), note, "here")


def write_files(folder, records, notes=None, human=None):
    paths = [folder / name for name in ("items.json", "ins.json", "human.json")]
    for path, data in zip(paths, (records, notes or {}, human or {}), strict=True):
        path.write_text(json.dumps(data))
    return paths


def shop(folder, records, notes=None, human=None, num_products=None):
    paths = write_files(folder, records, notes, human)
    return Catalogue(build_catalogue(folder / "made", *paths, num_products))


# Products


def test_a_record_becomes_a_product():
    made = product()
    assert made.query == "shirts"
    assert made.options == (
        ("size", ("small", "x-large | tall")),
        ("color", ("dark red", "blue")),
    )
    assert (made.prices, made.price_tag) == ((10.5,), "$10.5")
    assert made.index_text() == (
        "acme red shirt a shirt of cotton. machine wash. size: small, x-large | tall,"
        " and color: dark red, blue"
    )


@pytest.mark.parametrize(
    ("text", "prices", "tag"),
    [
        ("", (100.0,), "$100.0"),
        ("$19.99 - $27.99", (19.99, 27.99), "$19.99 to $27.99"),
        ("$1,234.5", (1234.5,), "$1234.5"),
        ("$1 $2 $3", (1.0, 2.0), "$1.0 to $2.0"),
    ],
)
def test_prices_are_read_as_officially(text, prices, tag):
    assert parse_price(text) == (prices, tag)


def test_a_price_within_a_range_follows_the_seed():
    ranged = product(pricing="$10 - $20")
    assert 10 <= ranged.price(0) <= 20
    assert ranged.price(0) == ranged.price(0) != ranged.price(1)


def test_a_product_without_annotation_has_a_dummy_attribute_and_no_goals():
    bare = product(note=None)
    assert (bare.attributes, bare.instruction) == (("DUMMY_ATTR",), "")


def test_control_characters_become_spaces_and_template_tokens_stay_text():
    assert product(name="a\x1b[31m\x00<|im_end|>").title == "a [31m <|im_end|>"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"name": None}, "here: None is no text; mend or remove the record"),
        ({"pricing": "$--"}, "here: could not convert string to float: ''; mend or remove the rec"),
        ({"customization_options": {"Size": [{}]}}, "here: the field 'value' is missing; mend or"),
    ],
)
def test_a_broken_record_is_one_clear_line(fields, line):
    with pytest.raises(DataError) as caught:
        product(**fields)
    assert str(caught.value).startswith(line)


def test_nan_repeated_and_overlong_asins_are_left_out(tmp_path):
    records = [record(1), record(1, name="again"), record(2, asin="nan"), record(3, asin="B" * 11)]
    made = shop(tmp_path, [*records, record(4), record(5)], num_products=5)
    assert [p.asin for p in made.products()] == ["B000000001", "B000000004"]
    assert made.find("B000000001").title == "Acme Red Shirt"


def test_a_file_that_is_no_list_is_refused(tmp_path):
    path = tmp_path / "items.json"
    for text in ("", "{}", "[1]", '[{"asin": '):
        path.write_text(text)
        with pytest.raises(DataError):
            list(stream_records(path))


@UNTIMED
@given(st.lists(st.dictionaries(SHORT, SHORT, max_size=3), max_size=5), st.integers(1, 40))
def test_streaming_reads_what_json_reads(tmp_path_factory, records, chunk):
    from step_ray.envs.webshop import products

    path = tmp_path_factory.mktemp("stream") / "items.json"
    path.write_text(json.dumps(records, indent=chunk % 3 or None), encoding="utf-8")
    normal, products._CHUNK = products._CHUNK, chunk
    try:
        assert list(stream_records(path)) == records
    finally:
        products._CHUNK = normal


# Search


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The men's T-Shirts", ["men", "t", "shirt"]),
        ("easy assembly technology", ["easi", "assembl", "technolog"]),
        ("color:red 7.5 inch, 1,000", ["color:r", "7.5", "inch", "1,000"]),
        ("up.if a_b _ ❤★ &", ["up.if", "a_b", "❤", "★"]),
        ("up is", ["up"]),
        ("", []),
    ],
)
def test_texts_become_lucenes_terms(text, terms):
    assert analyse(text) == terms


@UNTIMED
@given(st.text(max_size=60))
def test_any_text_can_be_analysed(text):
    assert all(analyse(text))


@pytest.mark.parametrize(
    ("length", "stored"), [(0, 0), (39, 39), (40, 40), (41, 40), (57, 56), (310, 280), (466, 440)]
)
def test_lengths_are_kept_in_a_byte(length, stored):
    assert stored_length(length) == stored


def test_the_weights_are_bm25_with_k1_09_and_b_04(tmp_path):
    made = shop(
        tmp_path,
        [
            record(
                n, name=name, full_description="", small_description=[], customization_options=""
            )
            for n, name in enumerate(("cat", "cat cat dog", "bird"), 1)
        ],
    )
    idf, mean = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5)), 5 / 3
    once = idf / (1 + 0.9 * (0.6 + 0.4 * 1 / mean))
    twice = idf * 2 / (2 + 0.9 * (0.6 + 0.4 * 3 / mean))
    scores = made._index._engine.get_scores_from_ids(made._index._known(["cat"]))
    assert np.allclose(scores, [once, twice, 0])
    assert made.hits("cats") == (1, 0)


def test_results_without_any_word_are_dropped_and_equal_ones_go_by_asin(tmp_path):
    made = shop(tmp_path, [record(3), record(1), record(2)])
    assert made.hits("shirt") == (1, 2, 0)
    assert made.hits("qqqzzz") == ()
    assert made.hits("the") == ()


def test_at_most_fifty_results(tmp_path):
    made = shop(tmp_path, [record(n) for n in range(60)])
    assert made.hits("shirt") == tuple(range(50))


def test_special_searches(tmp_path):
    records = [record(1), record(2, category="garden", query="Lamps"), record(3)]
    made = shop(tmp_path, records, {"B000000003": NOTE})
    assert made.hits("<c> garden") == (1,)
    assert made.hits("<q> lamps") == (1,)
    assert made.hits("<a> machine wash") == (2,)
    session = Session(made, "x", seed="s")
    assert session.do("search[<r> anything]")
    assert sorted(session.state.hits) == [0, 1, 2]


# Pages and actions


@pytest.fixture
def session(tmp_path):
    records = [record(n, name=f"Shirt {n}") for n in range(1, 13)]
    return Session(shop(tmp_path, records, {"B000000001": NOTE}), "buy it")


def text(session):
    return pages.as_text(session.page())


def test_the_pages_read_as_officially(session):
    assert text(session) == "WebShop [SEP] Instruction: [SEP] buy it [SEP] Search"
    assert session.do("search[shirt]")
    assert text(session).startswith(
        "Instruction: [SEP] buy it [SEP] Back to Search [SEP] Page 1 (Total results: 12) [SEP]"
        " Next > [SEP] B000000001 [SEP] Shirt 1 [SEP] $10.5 [SEP] B000000002"
    )
    assert session.do("click[next >]")
    assert text(session) == (
        "Instruction: [SEP] buy it [SEP] Back to Search [SEP] Page 2 (Total results: 12) [SEP]"
        " < Prev [SEP] Next > [SEP] B000000011 [SEP] Shirt 11 [SEP] $10.5 [SEP] B000000012 [SEP]"
        " Shirt 12 [SEP] $10.5"
    )
    assert session.do("click[B000000011]")
    assert text(session) == (
        "Instruction: [SEP] buy it [SEP] Back to Search [SEP] < Prev [SEP] size [SEP] small [SEP]"
        " x-large | tall [SEP] color [SEP] dark red [SEP] blue [SEP] Shirt 11 [SEP] Price: $10.5"
        " [SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
    )
    assert session.do("click[Features]")
    assert text(session) == (
        "Instruction: [SEP] buy it [SEP] Back to Search [SEP] < Prev"
        " [SEP] Machine wash. [SEP] Soft."
    )
    assert session.do("click[< Prev]")
    assert session.do("click[Reviews]")
    assert text(session) == "Instruction: [SEP] buy it [SEP] Back to Search [SEP] < Prev"


def test_rich_text_marks_buttons_choices_and_what_was_seen(session):
    for action in ("search[shirt]", "click[b000000001]", "click[blue]"):
        assert session.do(action)
    lines = pages.as_rich_text(session.page()).splitlines()
    assert lines[0] == "You have clicked blue."
    assert lines[3] == "[button] Back to Search [button_]"
    assert "  [clicked button] blue [clicked button_]" in lines
    assert "  [button] small [button_]" in lines
    session.do("click[< prev]")
    assert "\n\n[clicked button] B000000001 [clicked button_]\nShirt 1\n" in pages.as_rich_text(
        session.page()
    )


def test_there_is_no_last_page_and_no_page_before_the_first(session):
    session.do("search[shirt]")
    assert not session.do("click[< prev]")
    for _ in range(5):
        assert session.do("click[next >]")
    assert text(session).endswith("Page 6 (Total results: 12) [SEP] < Prev [SEP] Next >")


def test_going_back_forgets_the_options_and_searching_works_everywhere(session):
    for action in ("search[shirt]", "click[b000000001]", "click[small]", "click[blue]"):
        session.do(action)
    assert session.state.options == {"size": "small", "color": "blue"}
    assert session.do("click[< prev]")
    assert (session.state.place, session.state.options) == (Place.RESULTS, {})
    session.do("click[b000000001]")
    session.do("click[description]")
    assert session.do("search[blue]")
    assert (session.state.place, session.state.number) == (Place.RESULTS, 1)
    session.do("click[back to search]")
    assert (session.state.place, session.state.seen) == (Place.START, frozenset())


@pytest.mark.parametrize(
    "action",
    [
        *("", "buy", "click[search]", "click[buy now]", "search[]", "click", "click[]", "[shirt]"),
        *("Click[back to search]", "think[hm]", "search shirt", "click[b000000001]", "search{a}"),
    ],
)
def test_what_is_not_understood_changes_nothing(session, action):
    before = text(session)
    assert not session.do(action)
    assert text(session) == before


@pytest.mark.parametrize(
    ("action", "parsed"),
    [
        ("click[Buy Now] ", ("click", "buy now")),
        ("search[a [b]]", ("search[a ", "b]")),
        ("search[a] search[b]", ("search[a] search", "b")),
        ("look", ("look", "")),
    ],
)
def test_brackets_are_read_greedily_as_officially(action, parsed):
    assert parse_action(action) == parsed


@settings(UNTIMED, max_examples=60)
@given(actions=st.lists(st.sampled_from(["s", "n", "p", "b", "o", "x", "d"]) | st.text(max_size=8)))
def test_no_sequence_of_actions_breaks_a_visit(tmp_path_factory, actions):
    words = {"s": "search[shirt]", "n": "click[next >]", "p": "click[< prev]", "x": "click[blue]"}
    words |= {"b": "click[back to search]", "o": "click[b000000001]", "d": "click[description]"}
    visit = Session(_SHOPS.setdefault(0, _small_shop(tmp_path_factory)), "buy it")
    for action in actions:
        before = text(visit)
        assert visit.do(words.get(action, action)) or text(visit) == before


_SHOPS = {}


def _small_shop(factory):
    return _SHOPS.get(0) or shop(factory.mktemp("shop"), [record(n) for n in range(1, 13)])


# Goals


def test_synthetic_goals_cross_the_options_and_tell_their_limit(tmp_path):
    made = shop(tmp_path, [record(1), record(2)], {"B000000001": NOTE})
    goals = list_goals(made, "synthetic", 0)
    assert {goal.options for goal in goals} == {
        (("color", colour), ("size", size))
        for colour in ("dark red", "blue")
        for size in ("small", "x-large | tall")
    }
    assert {goal.price_upper for goal in goals} <= {30.0, 40.0, 50.0}
    first = next(
        goal for goal in goals if goal.options[0][1] == "blue" and "small" in goal.options[1]
    )
    assert first.instruction == (
        "Find me machine wash shirts with color: blue, and size: small, and price lower than"
        f" {first.price_upper:.2f} dollars"
    )


def test_human_goals_need_attributes_and_have_values_only(tmp_path):
    good = {"instruction": "i want it.", "instruction_attributes": ["soft"]}
    good["instruction_options"] = ["blue"]
    human = {"B000000001": [good, good, good | {"instruction_attributes": []}], "B9": [good]}
    goals = list_goals(shop(tmp_path, [record(1)], human=human), "human", 0)
    assert sorted(goal.number for goal in goals) == [0, 1]
    assert {goal.options for goal in goals} == {(("", "blue"),)}
    assert goals[0].instruction.startswith("i want it, and price lower than ")
    assert goals[0].content() == goals[1].content()


def test_a_product_dearer_than_all_limits_has_none():
    assert draw_limit(product(pricing="$985"), 0, "k") == (1_000_000.0, "")
    assert draw_limit(product(pricing="$975"), 0, "k") == (
        990.0,
        ", and price lower than 990.00 dollars",
    )


# Reward


def goal(**fields):
    given = {"product": product(), "attributes": ("machine wash",), "price_upper": 20.0}
    return Goal(**given | {"options": (("color", "blue"), ("size", "small"))} | fields)


@pytest.mark.parametrize(
    ("options", "price", "reward"),
    [(["blue", "small"], 10.5, 1.0), (["blue"], 10.5, 0.75), ([], 10.5, 0.5), ([], 20.01, 0.25)],
)
def test_the_reward_counts_attributes_options_and_price(options, price, reward):
    assert score(product(), options, price, goal()).reward == reward


def test_an_attribute_counts_where_a_text_names_it_or_one_is_similar():
    named = product(note={"attributes": []})
    assert score(named, [], 0, goal(attributes=("cotton", "soft", "silk"))).attribute_hits == 2
    assert score(product(), [], 0, goal(attributes=("machine washable",))).attribute_hits == 1


@pytest.mark.parametrize(
    ("chosen", "wanted", "hits"),
    [
        (["navy blue"], [("color", "blue")], 1),
        (["black26"], [("color", "black26")], 0),
        (["size small"], [("size", "small")], 1),
        (["navy blue"], [("", "sky blue")], 1),
        (["x-large"], [("size", "xx-large")], 0),
        (["x-large"], [("", "xx-large")], 1),
        (["army\xa0green"], [("color", "army\xa0green")], 0),
    ],
)
def test_options_are_compared_as_officially(chosen, wanted, hits):
    assert count_option_hits(chosen, wanted) == hits


def test_the_fuzzy_match_ignores_marks_and_is_strict_at_85():
    assert similar("('color', 'red')", "color red")
    assert not similar("machine wash", "hand wash")


@pytest.mark.parametrize(
    ("matches", "similarity", "factor"),
    [
        *((True, 1.0, 1.0), (False, 0.21, 1.0), (False, 0.2, 0.5), (True, 0.2, 1.0)),
        *((True, 0.09, 0.1), (False, 0.09, 0.1), (True, 0.0, 0.0)),
    ],
)
def test_the_type_factor_follows_match_and_titles(matches, similarity, factor):
    assert type_factor(matches, similarity) == factor


def test_nouns_are_words_of_open_classes_with_letters():
    assert nouns("Women's T-Shirt for the Gym, 2 pcs 3XL") == (
        *("women", "shirt", "gym", "pcs", "3xl"),
    )
    assert title_similarity("Red Shirt", "Shirt Shirt Shoe") == 1 / 3
    assert title_similarity("Red Shirt", "2 of 3") == 0.2


# The catalogue on disk


def test_a_catalogue_is_made_once_and_other_inputs_make_another(tmp_path):
    paths = write_files(tmp_path, [record(1), record(2)])
    first = build_catalogue(tmp_path / "made", *paths)
    times = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    assert build_catalogue(tmp_path / "made", *paths) == first
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*")} == times
    assert build_catalogue(tmp_path / "made", *paths, 1) != first


def test_a_failed_conversion_leaves_nothing(tmp_path):
    paths = write_files(tmp_path, [record(1), record(2, name=None)])
    with pytest.raises(DataError, match=r"record 1: None is no text"):
        build_catalogue(tmp_path / "made", *paths)
    assert list((tmp_path / "made").iterdir()) == []


def test_what_is_written_reads_back(tmp_path):
    made = shop(tmp_path, [record(2), record(1)], {"B000000002": NOTE})
    assert list(made.products()) == [product(2), product(1, note=None)]
    assert (made.row("B000000001"), made.row("B0"), len(made)) == (1, None, 2)
    with pytest.raises(DataError, match=r"^asin: 'B0' is not in the catalogue"):
        made.find("B0")
    with pytest.raises(EnvError, match=r"no WebShop catalogue"):
        Catalogue(tmp_path / "nowhere")


def test_a_missing_file_is_named(tmp_path):
    paths = write_files(tmp_path, [record(1)])
    paths[1].unlink()
    with pytest.raises(DataError, match=r"ins\.json: the file is missing"):
        build_catalogue(tmp_path / "made", *paths)
