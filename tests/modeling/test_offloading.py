"""Weights that are offloaded to memory or disk, or sharded: the logits stay the same."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from support import small_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_visual_perceiver import VisualPerceiverForImageClassification
from hf_visual_perceiver.modeling import Budget, Pass
from hf_visual_perceiver.training.folder import save_folder


def answers(model, images) -> list[torch.Tensor]:
    """The logits on every execution path."""
    subsets = [Pass(Budget(num_active_queries=12)), Pass(Budget(num_active_queries=5)), Pass(Budget(dqs_threshold=0.3))]
    with torch.no_grad():
        state = model.start(images)
        return [
            model(images).logits,
            model(images, num_active_queries=5, dqs_threshold=0.3).logits,
            model(images, dqs_threshold=0.3, output_attentions=True).logits,
            *model.forward_budgets(images, subsets),
            state.extend(2).logits,
            state.extend(9).logits,
        ]


@pytest.fixture(params=["full", "block_causal"])
def network(request) -> VisualPerceiverForImageClassification:
    return VisualPerceiverForImageClassification(small_config(trunk_attention=request.param)).eval()


@pytest.mark.parametrize("offload", [cpu_offload, partial(disk_offload, offload_buffers=True)], ids=["cpu", "disk"])
def test_offloaded_as_a_whole(network, images, offload, tmp_path):
    expected = answers(network, images)
    more = {"offload_dir": tmp_path} if isinstance(offload, partial) else {}
    offload(network, execution_device=torch.device("cpu"), **more)
    assert all(p.is_meta for p in network.parameters())
    for given, wanted in zip(answers(network, images), expected, strict=True):
        assert torch.equal(given, wanted)


def test_every_module_offloaded_by_itself(network, images):
    expected = answers(network, images)
    names = [name for name, module in network.named_modules() if any(True for _ in module.parameters(recurse=False))]
    assert "visual_perceiver.cross_attention" in names
    assert "visual_perceiver.decoder" in names
    for name in names:
        copied = copy.deepcopy(network)
        module = copied.get_submodule(name)
        weights = {key: value.clone() for key, value in module.state_dict().items()}
        hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
        add_hook_to_module(module, hook)
        assert all(p.is_meta for p in module.parameters(recurse=False))
        for given, wanted in zip(answers(copied, images), expected, strict=True):
            assert torch.equal(given, wanted), name


def test_a_device_map_that_leaves_most_on_the_disk(network, images, tmp_path):
    expected = answers(network, images)
    save_folder(network, tmp_path / "model")
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    loaded = VisualPerceiverForImageClassification.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "offload"
    ).eval()
    assert {"cpu", "disk"} <= set(loaded.hf_device_map.values())
    for given, wanted in zip(answers(loaded, images), expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5)  # the file's weights lie at other addresses


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_modules(network, images, process_group):
    sharded = copy.deepcopy(network)
    parts = sharded.visual_perceiver
    for module in (parts.embeddings, parts.cross_attention, *parts.layers, parts.decoder, parts, sharded):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    labels = torch.arange(8) % 5
    for point in ({}, {"num_active_queries": 5}, {"dqs_threshold": 0.3}):
        losses = [model(images, labels=labels, **point).loss for model in (sharded, network)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    for (name, p), q in zip(sharded.named_parameters(), network.parameters(), strict=True):
        assert isinstance(p, DTensor), name
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=lambda text, name=name: f"{name}: {text}")
