"""Recipes: the included ones are valid, and errors are reported."""

import pytest

from hf_visual_perceiver.inference.loading import shipped
from hf_visual_perceiver.modeling import Budget
from hf_visual_perceiver.training.recipe import load_recipe
from hf_visual_perceiver.training.schedules import create_schedule
from hf_visual_perceiver.training.step import check_batch


RECIPES = sorted(shipped("training/recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    recipe = load_recipe(path)
    config = None if recipe.timm_name else recipe.model_config()
    ladder, ends = ([Budget()], None) if config is None else (config.ladder(), config.nested_steps)
    check_batch(recipe, create_schedule(recipe.budgets, ladder, recipe.seed, recipe.steps, ends), 1)


def test_the_papers_recipe_is_verbatim():
    recipe = load_recipe(shipped("training/recipes/cifar10_query_masking.yaml"))
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (350_000, 512, 5e-4)
    assert recipe.budgets == {"schedule": "uniform"}
    assert recipe.dataset == "uoft-cs/cifar10"
    a = recipe.augmentation
    assert (a.auto_augment, a.mixup, a.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (a.random_erasing, a.label_smoothing, a.repeats) == (0.25, 0.1, 3)
    assert (recipe.optimizer, recipe.weight_decay, recipe.min_learning_rate) == ("adamw", 0.05, 1e-5)


def test_overrides():
    overrides = ["steps=7", "warmup_steps=0", "augmentation.mixup=0", "config.num_queries=16", "learning_rate=5e-4"]
    recipe = load_recipe(RECIPES[0], [*overrides, "budgets.K=16", "evaluate_budgets=null"])
    assert recipe.steps == 7
    assert recipe.augmentation.mixup == 0
    assert recipe.model_config().num_queries == 16
    assert recipe.learning_rate == 5e-4
    assert load_recipe(RECIPES[0], ["mixed_precision=no"]).mixed_precision == "no"


def test_former_names_of_keys(tmp_path):
    path = tmp_path / "former.yaml"
    path.write_text(
        "architecture: visual_perceiver_nano_patch4_32\nqueries: {schedule: fixed, K: 4}\nevaluate_queries: [2]\n"
    )
    recipe = load_recipe(path, ["queries.K=8"])
    assert recipe.budgets == {"schedule": "fixed", "K": 8}
    assert recipe.evaluate_budgets == [2]
    assert "queries" not in recipe.to_dict()


def test_warmup_as_a_share_of_the_steps():
    path = shipped("training/recipes/cifar10_nano_stratified.yaml")
    assert load_recipe(path).warmup == 400
    assert load_recipe(path, ["steps=1000"]).warmup == 25
    assert load_recipe(path, ["steps=10"]).warmup == 0
    assert load_recipe(path, ["warmup_steps=7"]).warmup == 7
    # The lengths that published numbers were made with.
    for name, warmup in (("cifar10_stratified", 440), ("imagenet_tiny_patch16_224", 6255), ("cifar10_nano_cpu", 400)):
        assert load_recipe(shipped(f"training/recipes/{name}.yaml")).warmup == warmup
    with pytest.raises(
        ValueError, match=r"`warmup_steps` to be below steps = 10, got 400: .* warmup_steps=1, or .*=0.05"
    ):
        load_recipe(shipped("training/recipes/cifar10_nano_cpu.yaml"), ["steps=10"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("warmup_steps=1.5", r"`warmup_steps` to be a number of steps, or a share of them in \[0, 1\), got 1.5"),
        ("warmup_steps=-0.1", r"a share of them in \[0, 1\), got -0.1"),
        ("warmup_steps=-1", "`warmup_steps` to be a number of steps, .*got -1"),
        ("warmup_steps=nan", "`warmup_steps` to be a number of steps, .*got 'nan'"),
        ("warmup_steps=few", "`warmup_steps` to be a number of steps, .*got 'few'"),
        ("stepps=7", "Unknown key `stepps`.*Allowed keys: architecture, attention"),
        ("augmentation.mixupp=1", "Unknown key `mixupp`.*Allowed keys: .*auto_augment"),
        ("steps=many", "valid integer for `steps`, got 'many'"),
        ("steps=2.5", "valid integer for `steps`, got 2.5"),
        ("steps=0", "greater than or equal to 1 for `steps`, got 0"),
        ("architecture=resnet50", "Expected an architecture among .*got 'resnet50'"),
        ("mixed_precision=int8", "'no', 'bf16' or 'fp16' for `mixed_precision`, got 'int8'"),
        ("ema_decay=1.5", "less than 1 for `ema_decay`, got 1.5"),
        (
            "augmentation.label_smoothing=2",
            "`augmentation` of .*: .* less than or equal to 1 for `label_smoothing`, got 2",
        ),
        ("evaluate_budgets=[65]", r"integer in \[1, 64\], got 65"),
        ("config.hiden_size=24", r"`config` to be fields of VisualPerceiverConfig, got \['hiden_size'\]"),
        ("config.hidden_size=wide", "`config` does not fit: .*hidden_size"),
        ("config.num_channels=1", "`config.num_channels` to be 3"),
        ("augmentation.mixup=-1", "greater than or equal to 0 for `mixup`, got -1"),
        ("clip_gradient_norm=-1", "greater than 0 for `clip_gradient_norm`"),
        ("students.teacher=mean", "`students` of .*: .* 'full' or 'ema' for `teacher`, got 'mean'"),
        ("students.distillation=2", "less than or equal to 1 for `distillation`, got 2"),
        ("students.alpha=1", "Unknown key `alpha`.*Allowed keys: distillation, teacher, weight"),
        ("teacher=resnet18", "a dictionary or an instance of TeacherLoss for `teacher`, got 'resnet18'"),
        ("teacher.distillation=soft", "Missing key `model`"),
        ("teacher={model: a, distillation: firm}", "'soft' or 'hard' for `distillation`, got 'firm'"),
        ("teacher={model: a, temperature: 0}", "greater than 0 for `temperature`, got 0"),
        ("seed=-1", "greater than or equal to 0 for `seed`, got -1"),
        ("compile=1", "valid boolean for `compile`, got 1"),
        ("steps=true", "valid integer for `steps`, got True"),
        ("trunk=both", "'auto', 'packed' or 'split' for `trunk`, got 'both'"),
        ("unreadable=skip", "'error' or 'replace' for `unreadable`, got 'skip'"),
        ("micro_batch_size=0", "greater than or equal to 1 for `micro_batch_size`, got 0"),
        ("streaming=true", "`validation_split` to be given, as a stream has no last images"),
        ("min_learning_rate=1", "`min_learning_rate` to be at most learning_rate, got 1.0"),
        ("steps=[1", "YAML after the = of the override"),
        ("steps", "override such as steps=100, got 'steps'"),
    ],
)
def test_mistakes_are_named(override, message):
    path = shipped("training/recipes/cifar10_nano_cpu.yaml")
    with pytest.raises(ValueError, match=message):
        load_recipe(path, [override])


def test_students_of_an_average_need_one():
    with pytest.raises(ValueError, match=r"`ema_decay` to be given, as `students.teacher` is ema"):
        load_recipe(RECIPES[0], ["students.teacher=ema", "ema_decay=null"])


def test_a_group_can_be_absent():
    assert load_recipe(RECIPES[0], ["teacher=null"]).teacher is None
    teacher = load_recipe(RECIPES[0], ["teacher.model=folder", "teacher.weight=0.3"]).teacher
    assert (teacher.model, teacher.weight, teacher.distillation) == ("folder", 0.3, "soft")


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
