"""Golden values of what users rely on: names, options, costs, and the logits of the bundled checkpoint.

`python tests/golden/test_golden.py` rewrites golden.json after an intended change; check its diff.
"""

import contextlib
import io
import json
from pathlib import Path

import timm
import torch
import typer

import hf_visual_perceiver
from hf_visual_perceiver import VisualPerceiverConfig, bundled_checkpoint, count_macs
from hf_visual_perceiver.cli.main import app
from hf_visual_perceiver.modeling import ARCHITECTURES, VisualPerceiverForImageClassification


FILE = Path(__file__).with_name("golden.json")
POINTS = [(K, t) for K in (1, 8, 64) for t in (None, 0.8)]


def commands() -> dict[str, list[str]]:
    """The options of each command."""
    group = typer.main.get_command(app)
    return {name: sorted(o for p in c.params for o in p.opts) for name, c in sorted(group.commands.items())}


def macs() -> dict[str, list[int]]:
    """MACs of each named architecture: a quarter of the queries, all queries, and a quarter after selection."""
    result = {}
    for name in sorted(ARCHITECTURES):
        config = VisualPerceiverConfig.from_architecture(name, num_labels=10)
        few, all_of_them = config.num_queries // 4, config.num_queries
        result[name] = [count_macs(config, few), count_macs(config, all_of_them), count_macs(config, few, all_of_them)]
    return result


@torch.inference_mode()
def answers() -> dict[str, list[list[float]]]:
    """Numbers of queries and logits of the bundled nano checkpoint on noise, at some budgets."""
    folder = Path(bundled_checkpoint()).with_name("visual_perceiver_nano_cifar10")
    model = VisualPerceiverForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = {}
    for K, t in POINTS:
        output = model(images, num_active_queries=K, dqs_threshold=t)
        rows = torch.cat([output.active_queries.sum(1, keepdim=True), output.logits], dim=1)
        result[f"K={K}, t={t}"] = [[round(v, 4) for v in row] for row in rows.tolist()]
    return result


def measured() -> dict:
    return {
        "names": sorted(hf_visual_perceiver.__all__),
        "timm": sorted(n for n in timm.list_models("*perceiver*") + timm.list_models("cifar_resnet*")),
        "config": sorted(VisualPerceiverConfig(num_labels=10).to_dict()),
        "commands": commands(),
        "macs": macs(),
        "answers": answers(),
    }


def test_names_options_and_costs():
    expected, given = json.loads(FILE.read_text()), measured()
    for key in ("names", "timm", "config", "commands", "macs"):
        assert given[key] == expected[key], key


def test_answers():
    expected, given = json.loads(FILE.read_text())["answers"], answers()
    assert given.keys() == expected.keys()
    for point in given:
        torch.testing.assert_close(torch.tensor(given[point]), torch.tensor(expected[point]), rtol=1e-3, atol=2e-3)


if __name__ == "__main__":
    with contextlib.redirect_stderr(io.StringIO()):
        FILE.write_text(json.dumps(measured(), indent=1) + "\n")
