"""The selection rule, `select_queries`."""

import pytest
import torch

from hf_visual_perceiver import select_queries


def by_loops(tokens: torch.Tensor, threshold: float, reference: str) -> list[list[bool]]:
    """The selection rule as the paper states it, in plain loops."""
    result = []
    for image in tokens.double():
        keep: list[bool] = []
        for i, y in enumerate(image):
            earlier = range(i) if reference == "all" else [j for j in range(i) if keep[j]]
            cosines = [float(y @ image[j] / (y.norm() * image[j].norm()).clamp(min=1e-300)) for j in earlier]
            keep.append(not any(s > threshold for s in cosines))
        result.append(keep)
    return result


@pytest.mark.parametrize("reference", ["all", "kept"])
@pytest.mark.parametrize("threshold", [-1, -0.5, 0.0, 0.3, 0.7, 0.95])
def test_equals_the_loops(threshold, reference):
    tokens = torch.randn(5, 14, 6)
    tokens[:, 3] = 2 * tokens[:, 1] + 0.1 * torch.randn(5, 6)
    assert select_queries(tokens, threshold, reference).tolist() == by_loops(tokens, threshold, reference)


def test_the_rules_differ_in_a_chain():
    # b is near a, c is near b but not near a: literally, c goes too; greedily, it stays.
    angles = torch.tensor([0.0, 0.4, 0.8])
    tokens = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    assert select_queries(tokens, 0.9, "all").tolist() == [[True, False, False]]
    assert select_queries(tokens, 0.9, "kept").tolist() == [[True, False, True]]


@pytest.mark.parametrize("reference", ["all", "kept"])
def test_kept_is_a_superset_and_the_first_stays(reference):
    tokens = torch.randn(6, 20, 4)
    for threshold in (-1, -0.2, 0.5, 0.9):
        keep, fewest = select_queries(tokens, threshold, reference), select_queries(tokens, threshold, "all")
        assert keep[:, 0].all()
        assert (keep >= fewest).all()
    assert (select_queries(tokens, 0.5, reference).sum() > select_queries(tokens, 0.5).sum()) == (reference == "kept")


def test_a_threshold_of_one_keeps_all_even_copies():
    tokens = torch.randn(3, 1, 7).expand(3, 50, 7) * torch.rand(3, 50, 1)
    assert select_queries(tokens, 1).all()
    assert select_queries(tokens, 1.5).all()
    assert select_queries(tokens, 0.999999).sum() == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_values_are_safe(dtype):
    tokens = torch.randn(2, 6, 8).to(dtype)
    tokens[:, 1] = 0  # similar to nothing
    tokens[:, 2] = torch.finfo(dtype).max / 2  # whose square overflows
    tokens[:, 3] = torch.finfo(dtype).max / 4  # the same direction
    tokens[:, 4] = float("nan")
    tokens[0, 5] = float("inf")
    keep = select_queries(tokens, 0.99)
    assert keep[:, :3].all()
    assert not keep[:, 3].any()
    assert keep[:, 4].all()
    assert keep[0, 5]


def test_autocast_changes_nothing():
    # In bfloat16 both the cosines of neighbours, 0.9996, and the threshold would be 1.
    angles = 0.03 * torch.arange(30)
    tokens = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert select_queries(tokens, 0.9985).sum() == 1


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), -1.01, True, "0.5", None])
def test_bad_thresholds(threshold):
    with pytest.raises(ValueError, match="dqs_threshold"):
        select_queries(torch.randn(1, 2, 3), threshold)


def test_bad_tokens_and_reference():
    with pytest.raises(ValueError, match=r"\(B, K, D\)"):
        select_queries(torch.randn(2, 3), 0.5)
    with pytest.raises(ValueError, match="floating-point"):
        select_queries(torch.ones(1, 2, 3, dtype=torch.long), 0.5)
    with pytest.raises(ValueError, match="'all' or 'kept', got 'some'"):
        select_queries(torch.randn(1, 2, 3), 0.5, "some")
