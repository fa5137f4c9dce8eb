"""Levels of a convolutional stem: later queries read further features."""

import pytest
import timm
import torch
from support import small_config, with_statistics
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from hf_visual_perceiver.export.graph import trace
from hf_visual_perceiver.inference.stages import LevelStage, packed
from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification, count_macs
from hf_visual_perceiver.modeling.elastic import Budget
from hf_visual_perceiver.modeling.visual_perceiver_network import DenseTokens
from hf_visual_perceiver.training.folder import save_folder


LEVELS = {
    "stem": "conv",
    "stem_widths": [[6, 8], [8], [12]],
    "level_starts": [1, 6],
    "level_widths": [4, 2],
    "trunk_attention": "block_causal",
    "decoder_reads": "last_block",
}


@pytest.fixture(params=["pool", "stride"])
def layered(request) -> VisualPerceiverForImageClassification:
    fields = {**LEVELS, "stem_downsample": request.param, "stem_residual": request.param == "pool"}
    return with_statistics(VisualPerceiverForImageClassification(small_config(**fields)))


@torch.no_grad()
def test_levels_are_computed_when_queries_ask_for_them_and_counted(layered, images):
    ran = []
    for i, level in enumerate(layered.visual_perceiver.embeddings.levels):
        level.register_forward_hook(lambda *_, i=i: ran.append(i))
    for K, expected in ((1, []), (2, [0]), (6, [0]), (7, [0, 1]), (12, [0, 1])):
        ran.clear()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layered(images[:1], num_active_queries=K)
        assert ran == expected
        assert counter.get_total_flops() / 2 == pytest.approx(count_macs(layered.config, K), rel=5e-3)


@torch.no_grad()
def test_a_level_adds_channels(layered, images):
    """Compare with convolutions over the channels of all levels, with zero weights from later to earlier levels."""
    embeddings = layered.visual_perceiver.embeddings
    stem, (first, second) = embeddings.patch_embeddings.stem, embeddings.levels
    shared, *own = [block for stage in stem.stages for block in stage]
    x, outputs = shared(images), []
    for i, blocks in enumerate(zip(own, first.blocks, second.blocks, strict=True)):
        if i > 0 and stem.pool:
            outputs = [F.max_pool2d(y, 2) for y in outputs]
        new = []
        for level, block in enumerate(blocks):
            inputs = x if i == 0 else torch.cat(outputs[: level + 1], 1)
            y = block.act(block.norm(block.conv(inputs)))
            assert block.residual == (stem.pool and i == 1)
            new.append(y + outputs[level] if block.residual else y)
        outputs = new
    tokens, features = embeddings(images, end=3)
    torch.testing.assert_close(features[-1], torch.cat(outputs, 1), rtol=1e-5, atol=1e-5)
    expected = second.projection(torch.cat(outputs, 1)).flatten(2).transpose(1, 2) + embeddings.position_embeddings
    torch.testing.assert_close(tokens[2], expected, rtol=1e-5, atol=1e-5)
    # Packed for an engine and unpacked, they are the same.
    _, before = embeddings(images, end=2)
    stage = LevelStage(layered.visual_perceiver, layered.head, 2)
    for a, b in zip(stage.unpacked(packed(before)), before, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_queries_read_their_own_level(layered, images):
    """Compare each query's attention with levels and attention written out."""
    base = layered.visual_perceiver
    y, weights = base.look(images, 12)
    tokens, features = base.embeddings(images, end=3)
    assert y.shape == (len(images), 12, 24)
    assert weights.shape == (len(images), 1, 12, 16)
    assert features[-1].shape[1:] == (12 + 6 + 3, 4, 4)
    cross = base.cross_attention
    for query, level in ((0, 0), (1, 1), (5, 1), (6, 2), (11, 2)):
        key, value = cross.key_value(cross.norm_inputs(tokens[level])).chunk(2, dim=-1)
        scores = key @ cross.query(cross.norm_queries(cross.queries[query])) * 24**-0.5
        torch.testing.assert_close(weights[:, 0, query], scores.softmax(-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(y[:, query], (scores.softmax(-1)[:, None] @ value)[:, 0], rtol=1e-5, atol=1e-5)
    # The next level goes on from the features of the one before.
    (again,), _ = base.embeddings(base.embeddings(images, end=2)[1], first=2, end=3)
    torch.testing.assert_close(again, tokens[2])


@torch.no_grad()
@pytest.mark.parametrize("trunk", ["block_causal", "full"])
def test_going_on_equals_one_pass(images, trunk):
    model = with_statistics(VisualPerceiverForImageClassification(small_config(**{**LEVELS, "trunk_attention": trunk})))
    state = model.start(images)
    chosen = torch.tensor([4, 1])
    for K in (1, 4, 5, 8, 12):
        expected = model(images, num_active_queries=K).logits
        torch.testing.assert_close(state[chosen].extend(K).logits, expected[chosen], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.extend(K).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_output_query_reads_the_last_block(layered, images):
    """Compare with the decoder on only those tokens: at a fixed K and with selection, packed and masked."""
    base, ends = layered.visual_perceiver, [0, 1, 2, 4, 8, 12]
    for knobs in ({"num_active_queries": 6}, {"dqs_threshold": 0.95}, {"dqs_threshold": 0.6}):
        output = base(images, **knobs)
        for i, used in enumerate(output.active_queries):
            places = used.nonzero()[:, 0]
            first = max(end for end in ends if end <= places[-1])
            tokens = output.last_hidden_state[i][places[places >= first]]
            y = base.decoder.finish(base.decoder(tokens[None])[0])
            torch.testing.assert_close(output.pooler_output[i], base.norm(y)[0, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_selection_keeps_queries_of_all_levels(layered, images):
    output = layered(images, dqs_threshold=0.9)
    assert 1 < output.active_queries.sum(1).float().mean() < 12
    alone = torch.cat([layered(image[None], dqs_threshold=0.9).logits for image in images])
    torch.testing.assert_close(output.logits, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_a_number_of_queries_for_each_image(layered, images, threshold):
    K = torch.arange(len(images)) % 12 + 1
    levels = []
    for level in layered.visual_perceiver.embeddings.levels:
        level.register_forward_hook(lambda _module, x, _output: levels.append(len(x[0][0])))
    output = layered(images, num_active_queries=K, dqs_threshold=threshold)
    assert levels == [int((K > 1).sum()), int((K > 6).sum())]  # images that need a level, and no others
    engine = layered.optimize_for_inference(backend="torch")
    for i, image in enumerate(images):
        alone = layered(image[None], num_active_queries=int(K[i]), dqs_threshold=threshold)
        torch.testing.assert_close(output.logits[i], alone.logits[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(output.active_queries[i], alone.active_queries[0])
    again = engine(images, num_active_queries=K, dqs_threshold=threshold)
    torch.testing.assert_close(again.logits, output.logits, rtol=1e-4, atol=1e-5)
    # What each image cost is what it would have cost alone.
    knobs = {"num_active_queries": K.tolist(), "dqs_threshold": threshold}
    macs = layered.config.count_macs(Budget(**knobs), output)
    candidates = None if threshold is None else K.tolist()
    expected = [
        count_macs(layered.config, int(used), candidates and candidates[i]) for i, used in enumerate(output.used)
    ]
    assert macs.tolist() == expected


@torch.no_grad()
def test_one_file_for_both_libraries(layered, images, tmp_path):
    save_folder(layered, tmp_path / "model")
    ours = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    for K in (1, 5, 12):
        expected = layered(images, num_active_queries=K).logits
        torch.testing.assert_close(ours(images, num_active_queries=K), expected)
        torch.testing.assert_close(theirs(images, num_active_queries=K).logits, expected)


@torch.no_grad()
def test_graph_with_k_as_an_input(layered, images):
    graph = trace(layered).module()
    for K in (1, 2, 7):
        logits, _ = graph(images, torch.tensor(1.0), torch.tensor(K))
        torch.testing.assert_close(logits, layered(images, num_active_queries=K).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": "patch", "stem_widths": None}, "'conv'"),
        ({"level_starts": [0, 6]}, "ascend"),
        ({"level_starts": [6, 6]}, "ascend"),
        ({"level_starts": [6, 12]}, "ascend"),
        ({"level_starts": None}, "ascend"),
        ({"level_widths": [2]}, "2 `level_widths`"),
        ({"level_widths": [0, 2]}, "at least 1"),
        ({"level_widths": None}, "`level_widths`"),
        ({"level_widths": [2, 1]}, "in proportion"),
        ({"decoder_reads": "first"}, "'last_block'"),
        ({"stem_widths": [[6, 8], [], [12]]}, "in each"),
    ],
    ids=str,
)
def test_levels_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**{**LEVELS, **fields})


def test_in_training_some_images_see_their_own_block_alone(images):
    model = VisualPerceiverForImageClassification(small_config(**LEVELS, block_drop_rate=0.5))
    torch.manual_seed(0)
    mask = model.visual_perceiver.trunk_masks(DenseTokens(torch.zeros(200, 12, 24)))[0]
    blocks = model.visual_perceiver.query_block(mask.device)
    alone = (mask == (blocks[:, None] == blocks)).flatten(1).all(1)
    causal = (mask == (blocks[:, None] >= blocks)).flatten(1).all(1)
    assert (alone ^ causal).all()
    assert 60 < alone.sum() < 140
    model.eval()
    assert model.visual_perceiver.trunk_masks(DenseTokens(torch.zeros(2, 12, 24)))[0].shape == (1, 1, 12, 12)
