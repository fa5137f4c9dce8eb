"""Benchmarks of time and memory; the measured values themselves are not tested."""

import json
import time
from functools import partial

import pytest
import torch
from support import run, small_config, unwrapped

from hf_visual_perceiver import VisualPerceiverForImageClassification, count_macs
from hf_visual_perceiver.benchmark.benchmark import (
    Rival,
    benchmark,
    benchmark_table,
    forms_of,
    plan,
    plot_benchmark,
    timm_rival,
)
from hf_visual_perceiver.benchmark.timing import (
    SHORT,
    PeakMemory,
    interleaved,
    matmul_peak,
    median_ratio,
    page_faults,
    peak_memory,
)
from hf_visual_perceiver.modeling import Budget


CPU = torch.device("cpu")


def test_runs_are_interleaved():
    calls, takes = [], {"a": 0, "b": SHORT}

    def run(name):
        calls.append(name)
        time.sleep(takes[name])

    times = interleaved({name: partial(run, name) for name in takes}, 3, CPU, progress=False)
    # The first round warms up, and what takes no time runs before it is timed.
    assert "".join(calls) == "ab" + "aab" * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match="Expected at least 1 repetition, got 0"):
        interleaved({}, 0, CPU)


def test_ratios_are_of_the_same_repetition():
    # The machine was ten times slower in the second repetition, for both.
    assert median_ratio([1, 10, 1], [2, 20, 2]) == 0.5
    assert median_ratio([1, 30, 2], [2, 20, 2]) == 1


def test_peak_memory_counts_what_is_alive_together():
    with PeakMemory() as memory:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b * 2
        b.add_(1)  # in place: nothing new
        c.view(10, 100)  # a view: nothing new
    assert memory.peak == 2 * 4000
    assert memory.alive == 2 * 4000


def test_memory_falls_with_the_queries(model, images):
    few, many = (peak_memory(lambda K=K: model(images, num_active_queries=K), CPU) for K in (2, 12))
    assert few < many


def test_the_checkpoints_own_operating_point_does_not_leak_in(model, images):
    model.config.num_active_queries, model.config.dqs_threshold = 3, 0.3
    runs = plan(model, images, {"eager": (model, torch.float32)}, [Budget(num_active_queries=6)], {})
    assert {r.setting: r.call().active_queries.sum(1).tolist() for r in runs} == {"K=6": [6] * 8, "full": [12] * 8}


def test_page_faults():
    faults = page_faults(lambda: bytearray(2**26).count(1))
    assert faults is None or faults >= 2**26 // 2**21  # pages of at most 2 MiB
    assert not page_faults(lambda: None)


def test_peak_is_a_rate():
    assert matmul_peak(torch.nn.Linear(24, 48), CPU, torch.float32) > 1e8


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(0)
    model = VisualPerceiverForImageClassification(small_config()).eval()
    images = torch.randn(4, 3, 16, 16)
    rival = Rival(lambda pixels: pixels.sum(), macs=7)
    return benchmark(
        model,
        images,
        [2, 6],
        [Budget(num_active_queries=1), Budget(dqs_threshold=0.9)],
        repetitions=2,
        rivals={"sum": rival},
        progress=False,
    )


def test_rows(rows):
    assert {row.batch_size for row in rows} == {2, 6}
    assert {row.form for row in rows} == {"eager float32", "optimized float32", "sum"}
    config = small_config()
    for row in rows:
        assert row.images_per_second == pytest.approx(1000 * row.batch_size / row.ms)
        if row.setting.startswith("K="):
            assert row.macs == count_macs(config, int(row.used))
            assert row.relative_to_fixed is None
        if row.setting == "full":
            assert row.relative_time == 1
        if row.form == "eager float32":
            assert row.relative_to_first == 1
        if row.setting == "t=0.9":
            assert 1 <= row.used <= 12
            assert row.relative_to_fixed > 0
        if row.form == "sum":
            assert row.relative_time is None
            assert row.macs == 7


def test_one_image_has_percentiles(model, images, monkeypatch):
    def interleaved(runs, repetitions, *_):
        return {name: [0.001 * (i + 1) for i in range(repetitions)] for name in runs}

    monkeypatch.setattr("hf_visual_perceiver.benchmark.benchmark.interleaved", interleaved)
    monkeypatch.setattr("hf_visual_perceiver.benchmark.benchmark.matmul_peak", lambda *_: 1.0)
    arguments = {"forms": ["eager"], "budgets": [Budget(num_active_queries=1)], "repetitions": 3, "progress": False}
    rows = benchmark(model, images, [1, 2], single_calls=101, **arguments)
    assert {(row.batch_size, round(row.ms, 6), row.p50_ms == row.ms) for row in rows} == {(1, 51, True), (2, 2, False)}
    assert {row.p95_ms and round(row.p95_ms, 6) for row in rows} == {96, None}
    heads = [[column.header for column in benchmark_table([row], "queries").columns] for row in (rows[0], rows[-1])]
    assert "p50 (ms)" in heads[0]
    assert "p95 (ms)" in heads[0]
    assert "ms" in heads[1]
    # Too few repetitions have none.
    assert {row.p95_ms for row in benchmark(model, images, [1], **arguments)} == {None}


def test_only_torchs_memory_is_known(rows):
    """ONNX Runtime has its own allocator."""
    assert all((row.peak_mb is None) == (row.form == "optimized float32") for row in rows)


class TestTimm:
    @pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
    def test_a_classifier_beside_the_model(self, name):
        config = small_config(image_size=[32, 48])
        rival = timm_rival(name, config, torch.device("cpu"), torch.bfloat16)
        assert rival.dtype == torch.bfloat16
        assert rival.macs > 1e6
        with torch.no_grad():
            assert rival.run(torch.zeros(2, 3, 32, 48, dtype=torch.bfloat16)).shape == (2, 5)

    @pytest.mark.parametrize("name", ["resnet0", "timm/resnet10t", ""])
    def test_others_are_refused(self, name):
        with pytest.raises(ValueError, match="Expected a timm classifier for 16x16 images, got"):
            timm_rival(name, small_config(), torch.device("cpu"), torch.float32)


def test_table_and_plot(rows, tmp_path):
    table = benchmark_table(rows[:3], "queries")
    assert table.row_count == 3
    plot_benchmark(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_forms_agree(model, images):
    forms = forms_of(model, ["eager", "optimized", "grouped"], [torch.float32, torch.bfloat16])
    names = [f"{form} {dtype}" for dtype in ("float32", "bfloat16") for form in ("eager", "optimized", "grouped")]
    assert list(forms) == names
    with torch.no_grad():
        expected = model(images).logits
        for network, dtype in forms.values():
            logits = network(images.to(dtype)).logits.float()
            assert (logits - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.1) * expected.abs().max()
    with pytest.raises(ValueError, match="Expected forms among eager, optimized, int8, compiled, grouped, got 'fast'"):
        forms_of(model, ["fast"], [torch.float32])


def test_eight_bits_have_a_dtype_of_their_own(trained, monkeypatch):
    made = []
    optimize = type(trained).optimize_for_inference

    def counting(self, *arguments, **settings):
        made.append(settings)
        return optimize(self, *arguments, **settings)

    monkeypatch.setattr(type(trained), "optimize_for_inference", counting)
    forms = forms_of(trained, ["int8", "eager"], [torch.bfloat16, torch.float32])
    assert {name: dtype for name, (_, dtype) in forms.items()} == {
        "int8": torch.float32,
        "eager bfloat16": torch.bfloat16,
        "eager float32": torch.float32,
    }
    assert made == [{"int8": True}]
    assert forms["int8"][0].engine.sessions.int8


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory: 99"), torch.OutOfMemoryError("CUDA out of memory.")],
)
def test_a_batch_that_does_not_fit(model, images, error):
    def full(pixels):
        if len(pixels) > 5:
            raise error

    with pytest.raises(ValueError, match="Expected a batch of 8 images to fit in the memory of cpu; 4 fit"):
        benchmark(model, images, [8], repetitions=1, rivals={"huge": Rival(full)}, progress=False)
    with pytest.raises(ValueError, match="Expected a batch size of at least 1, got 0"):
        benchmark(model, images, [0], progress=False)


def test_command(tmp_path):
    result = run(
        *("visual-perceiver", "benchmark", "--batch-size", 1, "--single-calls", 3, "--budget", "K=4"),
        *("--timm", "resnet10t", "--form", "eager", "--form", "int8"),
        *("--dtype", "float32", "--json", tmp_path / "b.json", "--plot", tmp_path / "b.png"),
        env={"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "eager float32" in result.stdout
    assert "p95 (ms)" in result.stdout
    assert "threads 1" in unwrapped(result.stdout)
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["conditions"]["single_calls"] == 3
    assert {"K=4", "full", "all"} == {row["setting"] for row in written["rows"]}
    assert {row["form"] for row in written["rows"]} == {"eager float32", "int8", "timm's resnet10t, eager float32"}
    assert all(row["p50_ms"] <= row["p95_ms"] for row in written["rows"])
    assert (tmp_path / "b.png").exists()
