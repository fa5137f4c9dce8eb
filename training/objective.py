"""The loss of a training step: it combines several passes over one batch."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from hf_visual_perceiver.modeling import Pass
from hf_visual_perceiver.training.factory import Network
from hf_visual_perceiver.training.recipe import StudentLoss, TeacherLoss


class Objective(nn.Module):
    """A network with its loss, as one module, so that wrappers for several processes (DDP, FSDP) see a single forward.

    Without students each pass learns from the labels, and every image has the same weight in whichever pass it is. With
    students the first pass is the full network, which learns from the labels; the others learn from its output:

        L = L_full + lambda * mean over students of [alpha KL(stop-gradient(full) || student) + (1 - alpha) CE]

    This is the sandwich rule with in-place distillation of Yu & Huang (2019), "Universally Slimmable Networks". A
    frozen teacher, if there is one, replaces a share of the labels' loss, as in DeiT.

    Args:
        network: The classifier.
        students: Weights of the students' loss.
        teacher: Weights of the frozen teacher's loss; None if there is no teacher.
        stem_weight: Weight of the mean loss of `StemClassifiers`, added to the labels' loss; 0 turns them off.
    """

    def __init__(
        self,
        network: Network,
        students: StudentLoss | None = None,
        teacher: TeacherLoss | None = None,
        stem_weight: float = 0.0,
    ):
        super().__init__()
        self.network = network
        self.stem_weight = stem_weight
        self.stem_classifiers: StemClassifiers | None = None
        if stem_weight > 0:
            self.stem_classifiers = StemClassifiers(network.stem_channels, network.config.num_labels)
        self.students = students or StudentLoss()
        self.teacher = teacher

    def forward(
        self,
        pixel_values: torch.Tensor,
        targets: torch.Tensor,
        passes: Sequence[Pass],
        distils: bool = False,
        teacher_logits: torch.Tensor | None = None,
        averaged_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the losses of a batch.

        Args:
            pixel_values: (B, C, H, W), normalised.
            targets: (B, labels) probabilities.
            passes: Which images run at which budgets.
            distils: Whether the first pass is the full network and teaches the others.
            teacher_logits: (B, labels) logits of the frozen teacher.
            averaged_logits: (B, labels) logits of the full averaged network, which then teaches the students.

        Returns:
            (2,) float32: the loss of the passes that learn from the labels, and the students' mean loss. The step
            minimises their `total_loss`.
        """
        capturing: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
        if self.stem_classifiers is not None:
            capturing = self.network.captured_features()
        with capturing as features:
            all_logits = [logits.float() for logits in self.network.forward_budgets(pixel_values, passes)]
        learners = list(zip(passes, all_logits, strict=True))
        pupils: list[torch.Tensor] = []
        if distils:
            learners, pupils = learners[:1], all_logits[1:]
        labelled = pixel_values.new_zeros((), dtype=torch.float32)
        answers = sum(len(logits) for _, logits in learners)
        for p, logits in learners:
            taught = None if teacher_logits is None else teacher_logits[p.images]
            # Weighted by the number of images, so that every image counts the same in passes of any size.
            labelled = labelled + self.labelled_loss(logits, targets[p.images], taught) * (len(logits) / answers)
        if self.stem_classifiers is not None:
            guesses = self.stem_classifiers(features[0])
            losses = [self.labelled_loss(logits.float(), targets, teacher_logits) for logits in guesses]
            labelled = labelled + self.stem_weight * torch.stack(losses).mean()
        if not pupils:
            return torch.stack([labelled, torch.zeros_like(labelled)])
        answer = (all_logits[0] if averaged_logits is None else averaged_logits.float()).detach()
        losses = [student_loss(logits, answer, targets, self.students.distillation) for logits in pupils]
        return torch.stack([labelled, torch.stack(losses).mean()])

    def labelled_loss(self, logits: torch.Tensor, targets: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
        """Cross-entropy with the targets, interpolated with the frozen teacher's loss if there is a teacher."""
        loss = soft_cross_entropy(logits, targets)
        if taught is None or self.teacher is None:
            return loss
        return torch.lerp(
            loss,
            distillation_loss(logits, taught.float(), self.teacher.distillation, self.teacher.temperature),
            self.teacher.weight,
        )

    def total_loss(self, losses: torch.Tensor) -> torch.Tensor:
        """The weighted sum of what `forward` returns."""
        return losses[0] + self.students.weight * losses[1]


class StemClassifiers(nn.Module):
    """Linear classifiers on the pooled features of a stem's levels: (B, C, h, w) -> (B, labels) for each level.

    They train the convolutions directly, as in a convolutional network, while the queries learn to read their features
    (Lee et al. 2015, "Deeply-Supervised Nets"). They are not part of the trained model.

    Args:
        channels: Channels of the stem's features at each level, ascending.
        labels: Number of classes.
    """

    def __init__(self, channels: Sequence[int], labels: int):
        super().__init__()
        self.channels = channels
        self.heads = nn.ModuleList(nn.Linear(count, labels) for count in channels)

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        pooled = features.mean((2, 3))
        known = [channels for channels in self.channels if channels <= pooled.shape[1]]
        return [head(pooled[:, :channels]) for head, channels in zip(self.heads, known, strict=False)]


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of (B, labels) logits with target probabilities."""
    return F.cross_entropy(logits, targets)


def student_loss(logits: torch.Tensor, answer: torch.Tensor, targets: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha KL(softmax(answer) || softmax(logits)) + (1 - alpha) CE(targets, logits), the mean over images.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> student_loss(logits, logits, torch.tensor([[0.0, 1.0]]), alpha=1.0).item()
        0.0
    """
    divergence = F.kl_div(logits.log_softmax(-1), answer.log_softmax(-1), log_target=True, reduction="batchmean")
    return torch.lerp(soft_cross_entropy(logits, targets), divergence, alpha)


def distillation_loss(logits: torch.Tensor, taught: torch.Tensor, kind: str, temperature: float) -> torch.Tensor:
    """DeiT's distillation losses with a teacher's logits (Touvron et al. 2021, section 4).

    Soft: tau^2 KL(softmax(taught / tau) || softmax(logits / tau)). Hard: cross-entropy with the teacher's decision.
    """
    if kind == "hard":
        return F.cross_entropy(logits, taught.argmax(-1))
    ours, theirs = (logits / temperature).log_softmax(-1), (taught / temperature).log_softmax(-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2
