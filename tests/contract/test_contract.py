"""Contract tests of every registered family, and of a toy family that is unlike the others.

All code that takes a model uses the protocol of `modeling/elastic.py`, so it must also work for a family that the package
does not know.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support import small_config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from hf_visual_perceiver.benchmark.benchmark import benchmark, benchmark_table
from hf_visual_perceiver.data.images import ImageDataset
from hf_visual_perceiver.evaluation.calibration import Target, calibrate, candidate_budgets, with_default
from hf_visual_perceiver.evaluation.evaluate import Evaluation, default_budgets, evaluate
from hf_visual_perceiver.evaluation.retrieval import measure_retrieval
from hf_visual_perceiver.evaluation.robustness import measure_robustness
from hf_visual_perceiver.export.graph import export_onnx, export_program
from hf_visual_perceiver.export.runtime import load_exported
from hf_visual_perceiver.hub.card import render_card
from hf_visual_perceiver.hub.folder_check import check_points
from hf_visual_perceiver.inference.cascade import Cascade, top_probability
from hf_visual_perceiver.inference.classification import classify
from hf_visual_perceiver.inference.loading import load_config, load_model
from hf_visual_perceiver.modeling import FAMILIES, Budget, ElasticConfig, ElasticModel, Family, Pass
from hf_visual_perceiver.modeling.elastic import check_keywords
from hf_visual_perceiver.training.folder import save_folder
from hf_visual_perceiver.training.objective import Objective
from hf_visual_perceiver.training.schedules import create_schedule, describe, step_macs


EXITS = 3


class EarlyExitConfig(ElasticConfig, PreTrainedConfig):
    """A convolutional network that images may leave early."""

    model_type = "early_exit"
    unit: ClassVar[str] = "exits"
    knobs: ClassVar[Mapping[str, str]] = {"exit": "max_exit", "p": "exit_threshold"}
    title: ClassVar[str] = "Early-exit network"

    image_size: int = 16
    num_channels: int = 3
    width: int = 8
    max_exit: int | None = None
    exit_threshold: float | None = None
    pretrained_cfg: Any = None

    def budgets(self) -> list[Budget]:
        return [*(Budget(max_exit=e) for e in range(1, EXITS)), Budget()]

    def adaptive_budgets(self) -> list[Budget]:
        return [Budget(exit_threshold=p) for p in (0.2, 0.22, 0.3, 0.6)]

    def resolve(self, **knobs: Any) -> dict[str, Any]:
        if unknown := knobs.keys() - set(self.knobs.values()):
            raise ValueError(f"Expected knobs among max_exit, exit_threshold, got {', '.join(unknown)}.")
        last, p = knobs.get("max_exit"), knobs.get("exit_threshold")
        last, p = EXITS if last is None else last, 2.0 if p is None else p
        if isinstance(last, bool) or not isinstance(last, int) or not 1 <= last <= EXITS:
            raise ValueError(f"Expected `max_exit` to be an integer in [1, {EXITS}], got {last!r}.")
        if not p >= 0:
            raise ValueError(f"Expected `exit_threshold` to be at least 0, got {p!r}.")
        return {"max_exit": last, "exit_threshold": p}

    def count_macs(self, budget: Budget | None = None, output: Any = None) -> Any:
        N, W = self.image_size**2, self.width
        at = [N * 9 * self.num_channels * W + (i * N * 9 * W * W) + (i + 1) * W * self.num_labels for i in range(EXITS)]
        knobs = self.resolve(**(self.default_budget if budget is None else budget).kwargs)
        return at[knobs["max_exit"] - 1] if output is None else torch.tensor(at)[output.used.cpu() - 1]


@dataclass
class EarlyExitOutput(ModelOutput):
    logits: torch.Tensor | None = None
    used: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None


class EarlyExitModel(PreTrainedModel):
    config_class = EarlyExitConfig
    base_model_prefix = "trunk"
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        widths = [config.num_channels, *[config.width] * EXITS]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.3)
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values, max_exit=None, exit_threshold=None, **kwargs):
        check_keywords(self, kwargs)
        last = self.config.knobs_for(max_exit=max_exit, exit_threshold=exit_threshold)["max_exit"]
        x = pixel_values
        for conv in self.convs[:last]:
            x = conv(x).relu()
        return EarlyExitOutput(pooler_output=x.mean((2, 3)), used=torch.full((x.shape[0],), last, device=x.device))


class EarlyExitForImageClassification(EarlyExitModel, ElasticModel):
    base_model_prefix = "trunk"

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.trunk = EarlyExitModel(config)
        self.heads = nn.ModuleList(nn.Linear(config.width, config.num_labels) for _ in range(EXITS))
        self.post_init()

    def forward(self, pixel_values, max_exit=None, exit_threshold=None, **kwargs):
        check_keywords(self, kwargs)
        knobs = self.config.knobs_for(max_exit=max_exit, exit_threshold=exit_threshold)
        B, x = pixel_values.shape[0], pixel_values
        if knobs["exit_threshold"] > 1:  # all stay to the end
            pooled = self.trunk(x, max_exit=knobs["max_exit"], **kwargs)
            return EarlyExitOutput(logits=self.heads[knobs["max_exit"] - 1](pooled.pooler_output), used=pooled.used)
        going = torch.arange(B, device=x.device)
        logits = x.new_zeros(B, self.config.num_labels)
        used = torch.zeros(B, dtype=torch.long, device=x.device)
        for i in range(knobs["max_exit"]):
            x = self.trunk.convs[i](x).relu()
            answer = self.heads[i](x.mean((2, 3)))
            logits, used = logits.index_copy(0, going, answer), used.index_fill(0, going, i + 1)
            if i + 1 < knobs["max_exit"]:
                on = answer.softmax(-1).amax(-1) < knobs["exit_threshold"]
                going, x = going[on], x[on]
                if not len(going):
                    break
        return EarlyExitOutput(logits=logits, used=used)

    def blocks(self):
        return self.trunk.convs


TOY = Family(EarlyExitConfig, EarlyExitModel, EarlyExitForImageClassification, {"early_exit_3": {}})


@pytest.fixture
def toy(monkeypatch):
    """Register the toy family during a test."""
    monkeypatch.setitem(FAMILIES, EarlyExitConfig.model_type, TOY)
    AutoConfig.register(EarlyExitConfig.model_type, EarlyExitConfig, exist_ok=True)
    return EarlyExitForImageClassification(EarlyExitConfig(num_labels=5)).eval()


@pytest.fixture(params=[*FAMILIES, EarlyExitConfig.model_type])
def elastic(request, toy):
    """A small network of each family."""
    if request.param == EarlyExitConfig.model_type:
        return toy
    small = {"visual_perceiver": small_config}.get(request.param)
    family = FAMILIES[request.param]
    shallow = {
        "dynamic_vision_transformer": {"num_hidden_layers": 2},
        "lookupvit": {"num_hidden_layers": 2},
        "qna_vit": {"local_depths": [0, 1, 1], "qna_depths": [1, 1, 0]},
    }.get(request.param, {})
    config = small() if small else family.create_config(next(iter(family.architectures)), num_labels=5, **shallow)
    model = family.classifier(config).eval()
    if hasattr(model, "heads"):  # some images are to stop early
        for head in model.heads:
            torch.nn.init.normal_(head.weight)
    return model


@pytest.fixture
def pixels(elastic):
    height, width = elastic.config.image_height_width
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, elastic.config.num_channels, height, width, generator=generator)


@pytest.fixture
def data(elastic):
    height, width = elastic.config.image_height_width
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, height, width, 3), dtype=np.uint8)
    return ImageDataset(images, np.arange(40) % 5, elastic.config.label_names)


class TestConfig:
    def test_round_trip(self, elastic, tmp_path):
        folder = save_folder(elastic, tmp_path / "model") if elastic.config.model_type != "early_exit" else tmp_path
        if folder == tmp_path:  # its code is in this file, and travels with no checkpoint
            elastic.config.save_pretrained(folder)
        again = type(elastic.config).from_pretrained(folder)
        assert again.default_budget == elastic.config.default_budget
        assert again.budgets() == elastic.config.budgets()
        assert load_config(str(folder)).label_names == elastic.config.label_names

    def test_budgets_ascend(self, elastic):
        config = elastic.config
        for budgets in (config.budgets(), config.ladder()):
            macs = [config.count_macs(budget) for budget in budgets]
            assert macs == sorted(set(macs))
            assert budgets[-1] == Budget()
        assert not any(config.is_adaptive(budget) for budget in config.ladder())
        assert all(config.is_adaptive(budget) for budget in config.adaptive_budgets())
        stages = config.count_stages(config.budgets())
        assert stages[0] == config.count_macs(config.budgets()[0])
        assert stages == sorted(stages)

    def test_what_does_not_fit_is_refused(self, elastic):
        config = elastic.config
        for text in ("no_such_knob=1", *(f"{short}=-3" for short in config.knobs), *(f"{s}='x'" for s in config.knobs)):
            with pytest.raises((ValueError, TypeError)):
                config.parse_budget(text)
        with pytest.raises(ValueError, match="no_such_knob"):
            config.parse_budget("no_such_knob=1")

    def test_a_default_budget_is_written_to_config_json(self, elastic):
        config = elastic.config
        values = {**config.to_dict(), "model_type": config.model_type}
        budget = config.budgets()[0]
        changed = type(config).from_dict(with_default(values, budget))
        assert changed.default_budget == budget
        assert type(config).from_dict(with_default(values, Budget())).default_budget == Budget()

    def test_numbers_of_other_libraries_are_stored(self, elastic, tmp_path):
        config = elastic.config
        if config.model_type == "early_exit":  # its config is not the package's
            return
        for number in (np.int64, torch.tensor):
            for knobs in (budget.kwargs for budget in config.budgets()[:-1]):
                changed = type(config)(**{name: number(value) for name, value in knobs.items()})
                changed.save_pretrained(tmp_path)
                assert type(config).from_pretrained(tmp_path).default_budget == Budget(**knobs)


class TestModel:
    @torch.no_grad()
    def test_batch_is_one_by_one(self, elastic, pixels):
        config = elastic.config
        for budget in default_budgets(config):
            knobs = config.resolve(**budget.kwargs)
            output = elastic(pixels, **knobs)
            assert output.logits.shape == (6, 5)
            assert output.used.shape == (6,)
            assert not output.used.is_floating_point()
            for i in range(6):
                alone = elastic(pixels[i, None], **knobs)
                torch.testing.assert_close(output.logits[i, None], alone.logits, rtol=1e-4, atol=1e-5)
                assert output.used[i] == alone.used[0]

    def test_macs_are_those_of_the_forward(self, elastic, pixels):
        config = elastic.config
        for budget in default_budgets(config):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
                outputs = [elastic(x[None], **config.resolve(**budget.kwargs)) for x in pixels]
            macs = [config.count_macs(budget, output).item() for output in outputs]
            assert sum(macs) == pytest.approx(counter.get_total_flops() / 2, rel=5e-3)
            if not config.is_adaptive(budget):
                assert set(macs) == {config.count_macs(budget)}

    def test_training_passes(self, elastic, pixels):
        config = elastic.config
        labels = torch.eye(5)[torch.arange(6) % 5]
        passes = [Pass(), Pass(config.budgets()[0], slice(0, None, 2)), *map(Pass, config.adaptive_budgets()[:1])]
        with torch.no_grad():
            for p, logits in zip(passes, elastic.forward_budgets(pixels, passes), strict=True):
                expected = elastic(pixels[p.images], **config.resolve(**p.budget.kwargs)).logits
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        schedules = [{"schedule": "fixed", "K": 1}, {"schedule": "uniform"}, {"schedule": "stratified", "groups": 2}]
        if len(config.ladder()) > 1:
            schedules.append({"schedule": "sandwich", "students": 2, "smallest": True})
        elastic.train()
        for queries in schedules:
            schedule = create_schedule(queries, config.ladder(), seed=0)
            objective = Objective(elastic)
            objective.total_loss(objective(pixels, labels, schedule(3), schedule.distils)).backward()
            assert describe(schedule(3), config.knobs)
            assert 0 < step_macs(config, schedule, 3) <= 3 * config.count_macs(Budget())
        assert all(p.grad is not None for p in elastic.parameters())
        assert list(elastic.blocks())


class TestKeywords:
    def test_unknown_ones_are_refused(self, elastic, pixels):
        for model in (elastic, elastic.base_model):
            for given in ({"max_exits": 1, "num_querys": 2}, {"max_exits": 1, "num_querys": 2, "return_dict": True}):
                with pytest.raises(ValueError, match="Expected keywords") as error:
                    model(pixels, **given)
                expected, names = str(error.value).split(", got ")
                assert names == "max_exits, num_querys."
                assert expected.startswith("Expected keywords of `forward` among pixel_values, ")
                assert ("output_attentions" in expected) == bool(model._can_record_outputs)
                assert model is elastic.base_model or all(knob in expected for knob in elastic.config.knobs.values())

    def test_what_transformers_passes_is_allowed(self, elastic, pixels):
        passed = {"num_items_in_batch": torch.tensor(6), "output_attentions": False, "output_hidden_states": None}
        passed["input_ids"] = None  # of wrappers for text models, such as some of PEFT's
        for model in (elastic, elastic.base_model):
            with torch.no_grad():
                expected, given = model(pixels), model(pixels, **passed)
            assert given.keys() == expected.keys()
            assert given[next(iter(given))].equal(expected[next(iter(expected))])

    def test_what_is_not_recorded_is_refused(self, elastic, pixels):
        elastic.set_attn_implementation("eager")  # transformers records no other attention
        budget = elastic.config.resolve(**elastic.config.budgets()[0].kwargs)
        for name in ("output_attentions", "output_hidden_states"):
            for model, knobs in ((elastic, budget), (elastic, {}), (elastic.base_model, {})):
                setattr(elastic.config, name, False)
                for given in ({name: True}, {}):  # then the config asks for it
                    if model._can_record_outputs:
                        assert model(pixels, **given, **knobs)[name.removeprefix("output_")]
                    else:
                        with pytest.raises(
                            ValueError, match=f"Expected `{name}` to be False, as .*{type(model).__name__} .*, got True"
                        ):
                            model(pixels, **given, **knobs)
                    setattr(elastic.config, name, True)
                assert name.removeprefix("output_") not in model(pixels, **{name: False}, **knobs)
            setattr(elastic.config, name, False)

    @torch.no_grad()
    def test_compiles_as_one_graph(self, elastic, pixels):
        knobs = elastic.config.resolve(**elastic.config.budgets()[0].kwargs)
        expected = elastic(pixels, **knobs).logits
        torch.compiler.reset()
        compiled = torch.compile(elastic, fullgraph=True, backend="eager")
        for passed in ({}, {"output_attentions": False, "num_items_in_batch": 6}):
            torch.testing.assert_close(compiled(pixels, **knobs, **passed).logits, expected, rtol=1e-4, atol=1e-5)


class TestTools:
    def test_evaluation_calibration_and_cards(self, elastic, data, tmp_path):
        config = elastic.config
        conditions = {"model": "m", "dataset": "noise", "split": "test"}
        result = evaluate(elastic, data, batch_size=16, progress=False, conditions=conditions)
        assert (result.unit, result.knobs) == (config.unit, dict(config.knobs))
        assert Evaluation.from_dict(result.to_dict()) == result
        assert [row.budget for row in result.rows] == default_budgets(config)
        card = render_card(tmp_path, config, result)
        assert f"{config.unit}: mean" in card
        for row in result.rows:
            assert f"| {row.budget.short(config.knobs)} |" in card
        knobs = [list(config.knobs), []] if config.adaptive_budgets() else [[]]
        for search in knobs if len(config.budgets()) > 1 else []:
            budgets = candidate_budgets(config, search[-1:], Target("macs", 0.9))
            found = calibrate(elastic, data, Target("macs", 0.9), budgets, progress=False)
            assert found.achieved.macs <= 0.9 * found.full.macs + 1e-6 or not found.met

    def test_corruptions_and_neighbours(self, elastic, data):
        config = elastic.config
        robust = measure_robustness(elastic, data, None, ["contrast"], [1], batch_size=20, progress=False)
        assert robust.names[-1 - len(robust.adaptive)] == "full"
        assert len(robust.difficulty) == len(robust.adaptive)
        found = measure_retrieval(elastic.base_model, data, data, neighbours=1, progress=False)
        assert [row.accuracy for row in found.rows] == [1.0] * len(found.rows)
        assert found.rows[-1].used_mean == evaluate(elastic, data, [Budget()], progress=False).rows[0].used_mean
        assert found.rows[0].budget in default_budgets(config)

    @torch.no_grad()
    def test_cascade(self, elastic, pixels):
        budgets = elastic.config.budgets()
        if len(budgets) == 1:  # a static network has nothing to go on with
            return
        stages = [budgets[0], budgets[-1]]
        sure = top_probability(elastic(pixels, **elastic.config.resolve(**stages[0].kwargs)).logits)
        output = Cascade(elastic, stages, [sure.median().item()])(pixels)
        assert set(output.stage.tolist()) == {0, 1}
        for i, stage in enumerate(output.stage.tolist()):
            alone = elastic(pixels[i, None], **elastic.config.resolve(**stages[stage].kwargs))
            torch.testing.assert_close(output.logits[i, None], alone.logits, rtol=1e-4, atol=1e-5)
            assert output.used[i] == alone.used[0]

    def test_benchmark(self, elastic, pixels, monkeypatch):
        monkeypatch.setattr("hf_visual_perceiver.benchmark.benchmark.matmul_peak", lambda *_: 1.0)
        budgets = default_budgets(elastic.config)
        rows = benchmark(elastic, pixels, [3], budgets, ["eager"], repetitions=1, progress=False)
        assert {budget.short(elastic.config.knobs) for budget in budgets} <= {row.setting for row in rows}
        assert all(row.used and row.macs and row.ms for row in rows)
        assert benchmark_table(rows, elastic.config.unit).row_count == len(rows)

    def test_labels_and_costs_of_pictures(self, elastic, data):
        pictures = [data.image(i) for i in range(2)]
        for budget in (None, elastic.config.budgets()[0], *elastic.config.adaptive_budgets()[:1]):
            answers = classify(elastic, pictures, budget, top_k=2)
            assert all(len(a["labels"]) == 2 and a["used"] >= 1 and a["macs"] > 0 for a in answers)
        assert len(check_points(elastic.config)) >= 3

    def test_export(self, elastic, pixels, tmp_path):
        pytest.importorskip("onnxscript")
        config, budget = elastic.config, elastic.config.budgets()[0]
        assert export_onnx(elastic, tmp_path / "m.onnx", budget) < 1e-3
        assert export_program(elastic, tmp_path / "m.pt2", budget) < 1e-3
        expected = elastic(pixels, **config.resolve(**budget.kwargs))
        for file in ("m.onnx", "m.pt2"):
            given = load_exported(tmp_path / file)(pixels)
            torch.testing.assert_close(given.logits, expected.logits, rtol=0, atol=1e-4)
            assert given.used.equal(expected.used)
        for adaptive in config.adaptive_budgets()[:1]:
            with pytest.raises(ValueError, match="Expected a budget"):
                export_onnx(elastic, tmp_path / "adaptive.onnx", adaptive)
            assert not (tmp_path / "adaptive.onnx").exists()


def test_a_network_that_cannot_be_traced_is_named(toy, tmp_path, monkeypatch):
    forward = type(toy).forward
    monkeypatch.setattr(type(toy), "forward", lambda self, x, **knobs: forward(self, x if x.sum() > 0 else -x, **knobs))
    for export, name in ((export_onnx, "m.onnx"), (export_program, "m.pt2")):
        with pytest.raises(ValueError, match="Expected a network that torch can trace at exit=3"):
            export(toy, tmp_path / name, Budget())
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_toy_loads(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x, max_exit=2).logits, toy(x, max_exit=2).logits)
