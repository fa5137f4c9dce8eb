"""Losses: formulas, distillation targets, and micro-batches."""

import pytest
import timm
import torch
from accelerate import Accelerator
from support import small_config
from timm.utils import ModelEmaV3
from torch.nn import functional as F

from hf_visual_perceiver.inference.loading import shipped
from hf_visual_perceiver.modeling import Budget, Pass, VisualPerceiverForImageClassification
from hf_visual_perceiver.training.folder import save_folder
from hf_visual_perceiver.training.objective import Objective, distillation_loss, student_loss
from hf_visual_perceiver.training.recipe import StudentLoss, TeacherLoss, load_recipe
from hf_visual_perceiver.training.schedules import create_schedule
from hf_visual_perceiver.training.step import forward_backward
from hf_visual_perceiver.training.teacher import load_teacher


LABELS = [f"LABEL_{i}" for i in range(5)]
PREPROCESSING = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.fixture
def targets():
    return torch.rand(8, 5, generator=torch.Generator().manual_seed(3)).softmax(-1)


def random_logits(seed):
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(seed), requires_grad=True)


class TestFormulas:
    def test_students(self, targets):
        logits, answer = random_logits(0), random_logits(1).detach()
        p, log_q = answer.softmax(-1), logits.log_softmax(-1)
        divergence = (p * (p.log() - log_q)).sum(-1).mean()
        cross_entropy = -(targets * log_q).sum(-1).mean()
        for alpha in (0.0, 0.3, 1.0):
            expected = alpha * divergence + (1 - alpha) * cross_entropy
            torch.testing.assert_close(student_loss(logits, answer, targets, alpha), expected)

    def test_distillation_as_in_deit(self):
        logits, taught, tau = random_logits(0), random_logits(1).detach(), 3.0
        p, log_q = (taught / tau).softmax(-1), (logits / tau).log_softmax(-1)
        expected = (p * (p.log() - log_q)).sum(-1).mean() * tau**2
        torch.testing.assert_close(distillation_loss(logits, taught, "soft", tau), expected)
        expected = F.cross_entropy(logits, taught.argmax(-1))
        torch.testing.assert_close(distillation_loss(logits, taught, "hard", tau), expected)


class TestObjective:
    def test_without_students_every_image_counts_alike(self, model, images, targets):
        subsets = [
            Pass(Budget(num_active_queries=12), slice(0, None, 4)),
            Pass(Budget(num_active_queries=3), slice(1, None, 4)),
        ]
        subsets += [
            Pass(Budget(num_active_queries=7), slice(2, None, 4)),
            Pass(Budget(num_active_queries=1), slice(3, None, 4)),
        ]
        losses = Objective(model)(images, targets, subsets)
        K = [12, 3, 7, 1] * 2
        each = [
            F.cross_entropy(model(images[i, None], num_active_queries=K[i]).logits, targets[i, None]) for i in range(8)
        ]
        torch.testing.assert_close(losses, torch.stack([torch.stack(each).mean(), torch.tensor(0.0)]))

    def test_classifiers_of_the_stem(self, images, targets):
        """Each classifier reads the pooled channels of its own and earlier levels; the gradient reaches the stem."""
        stem = {"stem": "conv", "stem_widths": [[6, 8], [8], [12]], "level_starts": [1, 6], "level_widths": [4, 2]}
        model = VisualPerceiverForImageClassification(small_config(**stem, trunk_attention="block_causal"))
        objective = Objective(model, stem_weight=0.5)
        passes, levels = [Pass(Budget(num_active_queries=K)) for K in (12, 6, 1)], model.visual_perceiver.embeddings
        losses = objective(images, targets, passes)
        (_, features), stem_losses = levels(images, end=3), []
        for head, end in zip(objective.stem_classifiers.heads, (12, 12 + 6, 12 + 6 + 3), strict=True):
            logits = features[-1][:, :end].mean((2, 3)) @ head.weight.T + head.bias
            stem_losses.append(F.cross_entropy(logits, targets))
        without = Objective(model)(images, targets, passes)[0]
        torch.testing.assert_close(losses[0], without + 0.5 * torch.stack(stem_losses).mean())
        # A smaller budget has fewer levels, and no hook stays on the model.
        assert len(objective.stem_classifiers(levels(images, end=2)[1][-1])) == 2
        assert not levels._forward_hooks
        (objective(images, targets, passes)[0] - Objective(model)(images, targets, passes)[0]).backward()
        assert levels.levels[1].blocks[0].conv.weight.grad.abs().sum() > 0

    def test_other_stems_have_no_features(self, model):
        assert model.stem_channels == []
        with pytest.raises(ValueError, match=r"`stem` to be 'conv'.*got 'patch'"):
            Objective(model, stem_weight=0.5).network.captured_features().__enter__()

    @pytest.mark.parametrize("packed", [True, False])
    def test_students_teach_nothing_to_the_full_network(self, model, images, targets, packed):
        objective = Objective(model, StudentLoss(weight=0.7, distillation=1.0))
        model.packs_passes = packed
        captured = []
        forward_budgets = model.forward_budgets

        def capture(*args):
            all_logits = forward_budgets(*args)
            for logits in all_logits:
                logits.retain_grad()
            captured.extend(all_logits)
            return all_logits

        model.forward_budgets = capture
        losses = objective(
            images,
            targets,
            [
                Pass(Budget(num_active_queries=12)),
                Pass(Budget(num_active_queries=3)),
                Pass(Budget(num_active_queries=6)),
            ],
            distils=True,
        )
        objective.total_loss(losses).backward()
        full, *students = captured
        # Softmax minus target, whatever the students do.
        torch.testing.assert_close(full.grad, (full.softmax(-1) - targets).detach() / 8, rtol=0, atol=1e-6)
        for logits in students:
            expected = 0.7 * (logits.softmax(-1) - full.softmax(-1)).detach() / 8 / 2
            torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)

    def test_the_average_can_teach_the_students(self, model, images, targets):
        average = random_logits(5)
        subsets = [Pass(Budget(num_active_queries=12)), Pass(Budget(num_active_queries=3))]
        losses = Objective(model)(images, targets, subsets, distils=True, averaged_logits=average)
        student = model(images, num_active_queries=3).logits
        torch.testing.assert_close(losses[1], student_loss(student, average, targets, 1.0))

    @pytest.mark.parametrize("kind", ["soft", "hard"])
    def test_a_teacher_takes_its_share_of_the_labels(self, model, images, targets, kind):
        taught, subsets = (
            random_logits(4).detach(),
            [Pass(Budget(num_active_queries=12)), Pass(Budget(num_active_queries=3))],
        )
        plain = Objective(model)(images, targets, subsets, distils=True)
        loss = TeacherLoss(model="any", distillation=kind, weight=0.3, temperature=2.0)
        losses = Objective(model, teacher=loss)(images, targets, subsets, distils=True, teacher_logits=taught)
        theirs = distillation_loss(model(images).logits, taught, kind, 2.0)
        torch.testing.assert_close(losses[0], 0.7 * plain[0] + 0.3 * theirs)
        assert torch.equal(losses[1], plain[1])  # the students learn from the full network alone


@pytest.mark.parametrize("schedule", ["sandwich", "stratified", "uniform"])
@pytest.mark.parametrize("teacher", ["full", "ema"])
def test_micro_batches_change_no_gradient(images, targets, schedule, teacher):
    def gradients(micro_batch_size):
        torch.manual_seed(0)
        network = VisualPerceiverForImageClassification(small_config()).train()
        recipe = load_recipe(
            shipped("training/recipes/cifar10_nano_cpu.yaml"),
            [f"budgets.schedule={schedule}", f"students.teacher={teacher}", f"micro_batch_size={micro_batch_size}"],
        )
        accelerator, average = Accelerator(cpu=True), ModelEmaV3(network)
        torch.nn.init.normal_(average.module.head.weight)
        plan = create_schedule(recipe.budgets, small_config().ladder(), 0)
        model = Objective(network, recipe.students)
        losses = forward_backward(accelerator, model, images, targets, plan(2), plan, recipe, None, average)
        return losses, {name: p.grad for name, p in network.named_parameters()}

    (losses, whole), (other_losses, parts) = gradients("null"), gradients(4)
    torch.testing.assert_close(losses, other_losses)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


class TestTeacher:
    def test_a_folder_sees_the_images_in_its_own_normalisation(self, tmp_path, images, model):
        save_folder(model, tmp_path / "teacher")
        teacher = load_teacher(str(tmp_path / "teacher"), LABELS, (16, 16), PREPROCESSING)
        mean, std = (torch.tensor(PREPROCESSING[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
        cfg = model.config.timm_pretrained_cfg
        theirs = [torch.tensor(cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std")]
        expected = model((images * std + mean - theirs[0]) / theirs[1]).logits
        torch.testing.assert_close(teacher(images), expected, rtol=0, atol=1e-4)
        assert not teacher.train().model.training
        assert not any(p.requires_grad for p in teacher.parameters())

    def test_a_timm_model(self, monkeypatch):
        create_model = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create_model(name))  # without a network
        labels = [f"LABEL_{i}" for i in range(1000)]
        teacher = load_teacher("resnet10t.c3_in1k", labels, (176, 176), PREPROCESSING)
        x = torch.randn(1, 3, 176, 176)
        mean, std = (torch.tensor(PREPROCESSING[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
        cfg = teacher.model.pretrained_cfg
        theirs = [torch.tensor(cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std")]
        expected = teacher.model((x * std + mean - theirs[0]) / theirs[1])
        torch.testing.assert_close(teacher(x), expected, rtol=0, atol=1e-4)
        with pytest.raises(ValueError, match="a teacher for 32x32 images, got 176x176 in resnet10t"):
            load_teacher("resnet10t.c3_in1k", labels, (32, 32), PREPROCESSING)

    def test_mistakes_are_named(self, tmp_path, trained):
        save_folder(trained, tmp_path / "teacher")
        folder, names = str(tmp_path / "teacher"), trained.config.label_names
        with pytest.raises(ValueError, match="dataset's 5 labels, got 10 in"):
            load_teacher(folder, LABELS, (32, 32), PREPROCESSING)
        with pytest.raises(ValueError, match="dataset's labels, got 'airplane' for 'LABEL_0'"):
            load_teacher(folder, [f"LABEL_{i}" for i in range(10)], (32, 32), PREPROCESSING)
        with pytest.raises(ValueError, match="a teacher for 64x64 images, got 32x32"):
            load_teacher(folder, names, (64, 64), PREPROCESSING)
        with pytest.raises(ValueError, match=r"`teacher.model` to be a folder or Hub id .*got '.*absent'"):
            load_teacher(str(tmp_path / "absent"), names, (32, 32), PREPROCESSING)
