"""Split names, such as "train[:10]"."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_visual_perceiver.data.splits import parse_split


few = settings(derandomize=True, max_examples=60, deadline=None, database=None)
NAMES = st.text(st.characters(exclude_characters="[]"), min_size=1)
ENDS = st.none() | st.integers()


@few
@given(NAMES, ENDS, ENDS)
def test_a_part_is_its_name_and_its_ends(name, start, stop):
    assert parse_split(name) == (name, slice(None, None))
    first, last = ("" if end is None else end for end in (start, stop))
    assert parse_split(f"{name}[{first}:{last}]") == (name, slice(start, stop))


@pytest.mark.parametrize("text", ["", "train[", "train[]", "train[5]", "train[1:2:3]", "[:5]"])
def test_what_is_no_split(text):
    with pytest.raises(ValueError, match="Expected a split"):
        parse_split(text)
