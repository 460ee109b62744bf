"""Node labels in settings are what Ray takes; a wrong one is refused before Ray is asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from ray._private.label_utils import validate_label_selector

from step_ray.cluster.labels import NodeLabels
from step_ray.config import parse_config
from step_ray.errors import ConfigError

LABELS = TypeAdapter(NodeLabels)
TEXT = st.text(alphabet="aZ0._-/!(), in", max_size=20)


@pytest.mark.parametrize("wanted", ["spot", "!spot", "in(A100,H100)", "!in(a, b)", "1", "a.b_c-d"])
def test_rays_words_are_taken(wanted):
    assert LABELS.validate_python({"ray.io/market-type": wanted}) == {"ray.io/market-type": wanted}


@given(TEXT, TEXT)
def test_what_is_taken_ray_takes(key, wanted):
    try:
        LABELS.validate_python({key: wanted})
    except ValidationError:
        return
    assert validate_label_selector({key: wanted}) is None


@pytest.mark.parametrize("section", ["collect", "train", "serve"])
def test_a_wrong_selector_is_named(section):
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "r", section: {"node_labels": {"step-ray/role": "in()"}}})
    assert str(caught.value) == (
        f"{section}.node_labels: step-ray/role: 'in()' selects no node;"
        " use value, !value, in(a,b) or !in(a,b)"
    )


def test_a_wrong_label_is_named():
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "r", "train": {"node_labels": {"rôle": "a"}}})
    assert str(caught.value).startswith("train.node_labels: 'rôle' is no label;")
