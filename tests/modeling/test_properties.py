"""Property-based tests: packed batches, their groups, the selection rule, and budgets as text."""

import itertools
import string

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_visual_perceiver import select_queries
from hf_visual_perceiver.inference.onnx_perceiver import CallCost, boundaries
from hf_visual_perceiver.modeling.elastic import Budget
from hf_visual_perceiver.modeling.ragged import PackedLayout, attention_groups


few = settings(derandomize=True, max_examples=40, deadline=None, database=None)
COSTS = st.builds(CallCost, st.integers(0, 40), st.tuples(*[st.integers(0, 3)] * 3))


@st.composite
def masks(draw):
    """(B, K) bool, at least one in each row."""
    K = draw(st.integers(1, 6))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=K, max_size=K), min_size=1, max_size=6))
    keep = torch.tensor(rows)
    keep[:, draw(st.integers(0, K - 1))] = True
    return keep


@few
@given(masks(), st.sampled_from(["grouped", "varlen"]))
def test_packing_loses_nothing_and_reorders_images(keep, backend):
    layout = PackedLayout.from_mask(keep, backend)
    tokens = torch.arange(1.0, keep.numel() + 1).view(*keep.shape, 1)
    packed = layout.pack(tokens)
    assert packed.shape == (keep.sum(), 1)
    assert torch.equal(layout.unpack(packed), tokens * keep[..., None])
    assert layout.positions.sort().values.tolist() == list(range(len(keep)))
    images = torch.arange(len(keep))
    assert torch.equal(layout.unsort(images[layout.positions]), images)
    # The tokens of an image are neighbours, in the order of its queries.
    runs = [
        (image, [query for _, query in run])
        for image, run in itertools.groupby(
            zip(layout.image.tolist(), layout.query.tolist(), strict=True), key=lambda pair: pair[0]
        )
    ]
    assert runs == [(image, keep[image].nonzero()[:, 0].tolist()) for image in layout.positions.tolist()]


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_each_image_is_in_one_attention_group(lengths):
    lengths = sorted(lengths)
    tokens = torch.arange(sum(lengths))[:, None, None]
    image = first = 0
    for group in attention_groups(lengths):
        end = first + group.images * group.length
        assert lengths[image : image + group.images] == [group.length] * group.images
        assert group.first == first
        assert torch.equal(group.dense(tokens).transpose(1, 2).flatten(0, 1), tokens[first:end])
        image, first = image + group.images, end
    assert (image, first) == (len(lengths), sum(lengths))


@few
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=6, unique_by=lambda x: x[0]), COSTS
)
def test_no_other_cut_costs_less(lengths, cost):
    values, counts = zip(*sorted(lengths), strict=True)
    n = len(values)

    def price(ends):
        return sum(cost.of(sum(counts[start:end]), values[end - 1]) for start, end in itertools.pairwise([0, *ends]))

    ends = boundaries(values, counts, cost)
    assert ends == sorted(set(ends))
    assert ends[-1] == n
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, n), k) for k in range(n))
    assert price(ends) == min(price([*cut, n]) for cut in cuts)


@few
@given(st.integers(0, 2**31), st.floats(-1, 1.1), st.floats(-1, 1.1))
def test_a_higher_threshold_keeps_more_and_the_first_query_stays(seed, low, high):
    tokens = torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(seed))
    low, high = sorted((low, high))
    fewer, more = select_queries(tokens, low), select_queries(tokens, high)
    assert fewer[:, 0].all()
    assert not (fewer & ~more).any()
    greedy = select_queries(tokens, low, "kept")
    assert greedy[:, 0].all()
    assert not (fewer & ~greedy).any()


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.text(string.ascii_lowercase, min_size=1).map(lambda name: f"knob_{name}")


@few
@given(st.dictionaries(NAMES, NUMBERS | st.lists(NUMBERS), max_size=3))
def test_budgets_are_read_as_they_are_printed(knobs):
    budget = Budget(**knobs)
    assert Budget.parse(str(budget)) == budget
    assert hash(Budget.parse(str(budget))) == hash(budget)
    assert budget.kwargs == knobs
