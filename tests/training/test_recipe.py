"""Recipes: those that ship are valid, and mistakes are named."""

import pytest

from hf_visual_perceiver.loading import shipped
from hf_visual_perceiver.training.recipe import load_recipe
from hf_visual_perceiver.training.schedules import create_schedule


RECIPES = sorted(shipped("training/recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    recipe = load_recipe(path)
    create_schedule(recipe.queries, recipe.model_config().num_queries, recipe.seed)


def test_the_papers_recipe_is_verbatim():
    recipe = load_recipe(shipped("training/recipes/cifar10_query_masking.yaml"))
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (350_000, 512, 5e-4)
    assert recipe.queries == {"schedule": "uniform"}
    assert recipe.dataset == "uoft-cs/cifar10"
    a = recipe.augmentation
    assert (a.auto_augment, a.mixup, a.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (a.random_erasing, a.label_smoothing, a.repeats) == (0.25, 0.1, 3)
    assert (recipe.optimizer, recipe.weight_decay, recipe.min_learning_rate) == ("adamw", 0.05, 1e-5)


def test_overrides():
    overrides = ["steps=7", "warmup_steps=0", "augmentation.mixup=0", "config.num_queries=16", "learning_rate=5e-4"]
    recipe = load_recipe(RECIPES[0], [*overrides, "queries.K=16", "evaluate_queries=null"])
    assert recipe.steps == 7
    assert recipe.augmentation.mixup == 0
    assert recipe.model_config().num_queries == 16
    assert recipe.learning_rate == 5e-4
    assert load_recipe(RECIPES[0], ["mixed_precision=no"]).mixed_precision == "no"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepps=7", "Unknown key `stepps`.*Allowed keys: architecture, attention"),
        ("augmentation.mixupp=1", "Unknown key `mixupp`.*Allowed keys: auto_augment"),
        ("steps=many", "Expected int in .*steps, got 'many'"),
        ("steps=2.5", "Expected int in .*steps, got 2.5"),
        ("steps=0", "`steps` to be at least 1, got 0"),
        ("architecture=resnet50", "Expected an architecture among .*got 'resnet50'"),
        ("mixed_precision=int8", "one of .*'bf16'.*got 'int8'"),
        ("ema_decay=1.5", r"`ema_decay` to be in \(0, 1\), got 1.5"),
        ("augmentation.label_smoothing=2", r"`augmentation.label_smoothing` to be in \[0, 1\], got 2"),
        ("evaluate_queries=[65]", r"integer in \[1, 64\], got 65"),
        ("config.hiden_size=24", r"`config` to be fields of VisualPerceiverConfig, got \['hiden_size'\]"),
        ("config.hidden_size=wide", "`config` does not fit: .*hidden_size"),
        ("config.num_channels=1", "`config.num_channels` to be 3"),
        ("augmentation.mixup=-1", "`augmentation.mixup` to be at least 0, got -1"),
        ("clip_gradient_norm=-1", "`clip_gradient_norm` to be above 0"),
        ("min_learning_rate=1", r"`min_learning_rate` to be in \[0, learning_rate\]"),
        ("steps=[1", "YAML after the = of the override"),
        ("steps", "override such as steps=100, got 'steps'"),
    ],
)
def test_mistakes_are_named(override, message):
    path = shipped("training/recipes/cifar10_nano_cpu.yaml")
    with pytest.raises(ValueError, match=message):
        load_recipe(path, [override])


def test_broken_files(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: [1")
    with pytest.raises(ValueError, match="to be YAML"):
        load_recipe(path)
    path.write_text("just words")
    with pytest.raises(ValueError, match="to hold keys and values, got str"):
        load_recipe(path)
    path.write_text("steps: 3")
    with pytest.raises(ValueError, match="Missing key `architecture`"):
        load_recipe(path)


class TestSchedules:
    def test_uniform_covers_every_budget_alike(self):
        schedule = create_schedule({"schedule": "uniform"}, num_queries=8, seed=3)
        counts = [0] * 9
        for step in range(4000):
            counts[schedule(step)] += 1
        assert counts[0] == 0
        assert all(400 < count < 600 for count in counts[1:])

    def test_follows_from_seed_and_step(self):
        a, b, c = (create_schedule({"schedule": "uniform"}, 64, seed) for seed in (0, 0, 1))
        assert [a(s) for s in range(50)] == [b(s) for s in range(50)] != [c(s) for s in range(50)]

    def test_fixed(self):
        assert create_schedule({"schedule": "fixed", "K": 5}, 8, 0)(123) == 5

    @pytest.mark.parametrize(
        ("queries", "message"),
        [
            ({"schedule": "uniforn"}, "one of fixed, uniform, got 'uniforn'"),
            ({}, "one of fixed, uniform, got None"),
            ({"schedule": "uniform", "K": 3}, r"arguments \[\], got \['K'\]"),
            ({"schedule": "fixed"}, r"arguments \['K'\], got \[\]"),
            ({"schedule": "fixed", "K": 9}, r"integer in \[1, 8\], got 9"),
            ({"schedule": "fixed", "K": True}, r"integer in \[1, 8\], got True"),
        ],
    )
    def test_mistakes_are_named(self, queries, message):
        with pytest.raises(ValueError, match=message):
            create_schedule(queries, 8, 0)
