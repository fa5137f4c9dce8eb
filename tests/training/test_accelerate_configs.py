"""Configuration files for `accelerate launch`: accelerate reads them and starts the described setup."""

import copy
import os
import sys
import types
from collections import Counter
from types import SimpleNamespace

import accelerate.commands.launch as launch
import accelerate.utils.launch as launch_utils
import pytest
import torch
import torch.distributed.run
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from support import REPOSITORY, small_config

from hf_visual_perceiver.modeling import Budget, Pass, VisualPerceiverForImageClassification
from hf_visual_perceiver.training.distributed import all_finite, gathered
from hf_visual_perceiver.training.objective import Objective
from hf_visual_perceiver.training.state import apply_state, gather_state


FOLDER = REPOSITORY / "training" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
SCRIPT = ("training/train.py", "--config", "training/recipes/cifar10_query_masking.yaml")


@pytest.fixture
def launched(monkeypatch):
    """Run `accelerate launch` up to where processes would start; returns torchrun's arguments and the environment."""
    # DeepSpeed is not installed; the launcher asks it for no more than this.
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: True)
    runner = types.ModuleType("deepspeed.launcher.runner")
    runner.DEEPSPEED_ENVIRONMENT_NAME = "unused"
    for name in ("deepspeed", "deepspeed.launcher"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, runner.__name__, runner)
    # Tests run side by side.
    monkeypatch.setattr(launch_utils, "is_port_in_use", lambda port: False)

    def start(file, *options):
        calls = []
        monkeypatch.setattr(torch.distributed.run, "run", lambda args: calls.append((args, dict(os.environ))))
        args = launch.launch_command_parser().parse_args(["--config_file", str(FOLDER / file), *options, *SCRIPT])
        launch.launch_command(args)
        assert len(calls) == 1
        return calls[0]

    return start


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_leaves_the_precision_to_the_recipe(path):
    assert load_config_from_file(str(path)).mixed_precision is None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_says_how_to_use_it(path):
    assert f"accelerate launch --config_file training/accelerate/{path.name}" in path.read_text()


def test_one_gpu_starts_one_process_in_the_recipes_precision(monkeypatch):
    calls = []

    def popen(command, env):
        calls.append((command, env))
        return SimpleNamespace(wait=lambda: None, returncode=0)

    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    launch.launch_command(
        launch.launch_command_parser().parse_args(["--config_file", str(FOLDER / "one_gpu.yaml"), *SCRIPT])
    )
    ((command, environment),) = calls
    assert command[-3:] == list(SCRIPT)
    for name in (name for name in environment if name.startswith("ACCELERATE_")):
        monkeypatch.setenv(name, environment[name])
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        assert (accelerator.num_processes, accelerator.mixed_precision) == (1, "bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_several_gpus(launched):
    args, environment = launched("several_gpus.yaml")
    assert (args.nproc_per_node, args.training_script) == ("8", SCRIPT[0])
    assert args.training_script_args == list(SCRIPT[1:])
    assert "ACCELERATE_USE_FSDP" not in environment
    assert launched("several_gpus.yaml", "--num_processes", "4")[0].nproc_per_node == "4"


def test_several_nodes(launched):
    args, _ = launched("several_nodes.yaml", "--machine_rank", "3", "--main_process_ip", "10.1.1.1")
    config, *_ = torch.distributed.run.config_from_args(args)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (8, 8, 8)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("static", "10.1.1.1:29500")
    assert config.rdzv_configs["rank"] == 3


def test_deepspeed_zero2(launched):
    args, environment = launched("deepspeed_zero2.yaml")
    assert args.nproc_per_node == "8"
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    # accelerate clips at 1 unless told otherwise.
    assert float(environment["ACCELERATE_GRADIENT_CLIPPING"]) == 0


class TestFsdp2:
    @pytest.fixture
    def plugin(self, launched, monkeypatch):
        """The FSDP plugin that a process creates from the launcher's environment."""
        _, environment = launched("fsdp2.yaml")
        assert environment["ACCELERATE_USE_FSDP"] == "true"
        for name, value in environment.items():
            if name.startswith("FSDP_"):
                monkeypatch.setenv(name, value)
        return FullyShardedDataParallelPlugin()

    @pytest.fixture
    def process_group(self):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()

    def test_settings(self, plugin):
        assert plugin.fsdp_version == 2
        assert plugin.transformer_cls_names_to_wrap == ["VisualPerceiverLayer", "VisualPerceiverCrossAttention"]
        assert plugin.reshard_after_forward is False
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"
        assert plugin.cpu_ram_efficient_loading is False

    @pytest.mark.parametrize("as_a_part", [False, True], ids=["network", "network in a module"])
    def test_gradients_are_those_of_the_whole_network(self, plugin, process_group, images, as_a_part):
        plain = Loss(VisualPerceiverForImageClassification(small_config()).train())
        sharded = copy.deepcopy(plain)
        accelerator = accelerator_of(plugin)
        if as_a_part:
            sharded = fsdp2_prepare_model(accelerator, sharded)
            subsets = [Pass(Budget(num_active_queries=12)), Pass(Budget(num_active_queries=3))]
        else:
            # accelerate treats a transformers model in its own way; its forward takes one subset.
            fsdp2_prepare_model(accelerator, sharded.network)
            subsets = [Pass(Budget(num_active_queries=3))]
        split = Counter(type(module).__name__ for module in sharded.modules())
        assert split["FSDPVisualPerceiverLayer"] == split["FSDPVisualPerceiverCrossAttention"] == 2
        loss = sharded(images, subsets)
        torch.testing.assert_close(loss, plain(images, subsets))
        loss.backward()
        plain(images, subsets).backward()
        for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            assert isinstance(p, torch.distributed.tensor.DTensor), name
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=lambda text, name=name: f"{name}: {text}")

    def test_whole_weights_are_gathered(self, plugin, process_group, images):
        """Sharded weights are gathered for evaluation, publishing, saving and resuming."""
        networks = [VisualPerceiverForImageClassification(small_config()) for _ in range(3)]
        expected = networks[0].eval()(images).logits
        objectives = [Objective(network) for network in networks[:2]]
        optimizers = []
        for objective in objectives:
            fsdp2_prepare_model(accelerator_of(plugin), objective)
            optimizers.append(torch.optim.AdamW(objective.parameters()))
        assert torch.equal(gathered(objectives[0], networks[2]).eval()(images).logits, expected)
        state, facts = gather_state(objectives[0], optimizers[0], None)
        apply_state(state, facts, objectives[1], optimizers[1], None)
        assert torch.equal(gathered(objectives[1], networks[2]).eval()(images).logits, expected)
        alone = Accelerator(cpu=True)
        assert all_finite(alone, networks[1])
        with torch.no_grad():
            networks[1].head.weight.to_local()[0, 0] = torch.nan
        assert not all_finite(alone, networks[1])


def accelerator_of(plugin):
    """A stand-in for an accelerator with FSDP, which accelerate does not support on a CPU."""
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=True,
    )


class Loss(torch.nn.Module):
    """A network with its loss, as the training loop wraps it, for one or several subsets."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images, subsets):
        if len(subsets) > 1:
            answers = self.network.forward_budgets(images, subsets)
        else:
            answers = [self.network(images, **subsets[0].budget.kwargs).logits]
        return torch.stack([answer.logsumexp(-1).mean() for answer in answers]).sum()
