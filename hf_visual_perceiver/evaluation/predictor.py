"""A small network that predicts from cross-attention outputs which budgets will classify an image correctly.

It reads the outputs of the first queries. It is trained afterwards, with the classifier frozen, and needs a classifier
with `forward_chosen`. Shapes: B images, m probing queries, P budgets, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hf_visual_perceiver.inference.cascade import check_stages
from hf_visual_perceiver.modeling import Budget


class BudgetPredictor(nn.Module):
    """Maps cross-attention outputs of the first m queries to the log-odds of a correct prediction at each budget.

    (B, m, D) -> (B, P). It consists of a layer norm and an MLP with one hidden layer.
    """

    def __init__(self, width: int, num_probes: int, num_budgets: int, hidden: int = 64):
        super().__init__()
        self.num_probes = num_probes
        self.norm = nn.LayerNorm(num_probes * width)
        self.fc1 = nn.Linear(num_probes * width, hidden)
        self.fc2 = nn.Linear(hidden, num_budgets)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(y[:, : self.num_probes].flatten(1)))))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.fc1.weight.numel() + self.fc2.weight.numel()


def fit_predictor(
    y: torch.Tensor, correct: torch.Tensor, epochs: int = 30, hidden: int = 64, seed: int = 0
) -> BudgetPredictor:
    """Train a predictor with binary cross-entropy.

    Args:
        y: (n, m, D) cross-attention outputs of the first m queries.
        correct: (n, P) bool, whether each budget classifies the image correctly.
        epochs: Number of epochs.
        hidden: Width of the hidden layer.
        seed: Random seed.

    Example:
        >>> y, correct = torch.randn(32, 4, 8), torch.ones(32, 3, dtype=torch.bool)
        >>> fit_predictor(y, correct, epochs=2)(y).shape
        torch.Size([32, 3])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = BudgetPredictor(y.shape[2], y.shape[1], correct.shape[1], hidden)
        optimizer = torch.optim.AdamW(predictor.parameters(), lr=1e-3, weight_decay=0.05)
        for _ in range(epochs):
            for rows in torch.randperm(len(y)).split(256):
                loss = F.binary_cross_entropy_with_logits(predictor(y[rows]), correct[rows].float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return predictor.eval()


def choose_budgets(log_odds: torch.Tensor, budget_macs: Sequence[float], price: float) -> torch.Tensor:
    """Choose the budget of each image, (B,), that maximises P(correct) - `price` * (MACs / MACs of the largest budget).

    Example:
        >>> choose_budgets(torch.tensor([[0.0, 3.0], [2.0, 2.1]]), [1.0, 10.0], price=0.1).tolist()
        [1, 0]
    """
    shares = torch.as_tensor(budget_macs, dtype=torch.float32) / max(budget_macs)
    return (log_odds.float().sigmoid() - price * shares.to(log_odds.device)).argmax(dim=-1)


def predicted_macs(config: Any, budgets: Sequence[Budget], predictor: BudgetPredictor) -> list[int]:
    """Multiply-accumulates of an image at each budget, with the largest budget's cross-attention and the predictor."""
    return [macs + predictor.macs for macs in config.count_chosen(budgets)]


class PredictedBudgets:
    """Runs each image at a budget that a predictor chooses, all images in one batch.

    Args:
        model: Model in eval mode; its own default budget is ignored.
        predictor: See `fit_predictor`.
        budgets: The budgets that it predicts for, ascending.
        price: Probability of a correct prediction that the largest budget's MACs are worth; 0 ignores the cost.
    """

    def __init__(self, model: Any, predictor: BudgetPredictor, budgets: Sequence[Budget], price: float):
        self.model, self.predictor, self.price = model, predictor, price
        self.budgets = check_stages(model.config, budgets)
        if predictor.fc2.out_features != len(self.budgets):
            raise ValueError(
                f"Expected a predictor of {len(self.budgets)} budgets, got one of {predictor.fc2.out_features}."
            )

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> Any:
        """Classify images (B, C, H, W); returns what the model's forward returns."""
        macs = self.model.config.count_chosen(self.budgets)

        def choose(y: torch.Tensor) -> torch.Tensor:
            return choose_budgets(self.predictor(y), macs, self.price)

        return self.model.forward_chosen(pixel_values, self.budgets, choose)
