"""DistributedDataParallel: every process may draw its own number of queries."""

import pytest
from support import run


SCRIPT = """
import copy
import gc
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
levels = {levels}
stem = {"stem": "conv", "stem_widths": [[4], [6], [12]], "level_starts": [1, 5], "level_widths": [6, 3]}
fields = stem if levels else {}
config = VisualPerceiverConfig(
    image_size=16, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_queries=12, num_labels=5, initializer_range=0.3, **fields
)
model = VisualPerceiverForImageClassification(config)
images, labels = torch.randn(2, 2, 4, 3, 16, 16), torch.randint(5, (2, 2, 4))  # of each rank, of each of two batches
knobs = [
    [{"num_active_queries": 3}, {"num_active_queries": 12}],
    [{"num_active_queries": 7, "dqs_threshold": 0.3}, {"num_active_queries": 1}],
]
# Statistics of batch norms are each process's own, as gradients would otherwise depend on the other's images.
alone = copy.deepcopy(model)
for r in range(2):
    for step in range(2):
        (alone(images[r, step], labels=labels[r, step], **knobs[r][step]).loss / 2).backward()
wrapped = DistributedDataParallel(model, find_unused_parameters={levels})
with wrapped.no_sync():
    wrapped(images[rank, 0], labels=labels[rank, 0], **knobs[rank][0]).loss.backward()
wrapped(images[rank, 1], labels=labels[rank, 1], **knobs[rank][1]).loss.backward()
for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
    if q.grad is None:
        assert p.grad is None or not p.grad.any(), name
        continue
    torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
# What refers to the process group keeps its threads alive, and a late one aborts the process when Python exits.
del wrapped
gc.collect()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("levels", [False, True])
def test_processes_with_different_numbers_of_queries(tmp_path, levels):
    (tmp_path / "script.py").write_text(SCRIPT.replace("{levels}", str(levels)))
    ended = run("torchrun", "--nproc_per_node", 2, tmp_path / "script.py", env={"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
