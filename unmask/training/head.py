"""The trainable linear head after the pooling, and its initial weights by ridge regression.

Fitting it to the teacher's vectors before the first step spares the decoder from learning a rotation. Mean-pooled
states have a large common direction, which the first steps would otherwise be spent on.
"""

import numpy as np
import torch
from torch import nn


def ridge(features: np.ndarray, targets: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Fit an affine map from features to targets by ridge regression.

    Features are standardised for the fit, so that a channel a hundred times larger than the others is penalised like
    them; the result applies to them as they are.

    Args:
        features: [N, F]. targets: [N, W], not centred.
        penalty: added to the diagonal of the standardised features' second moment, which is N.

    Returns:
        weight [W, F] and bias [W], float32: targets ~ features @ weight.T + bias.
    """
    x, y = features.astype(np.float64), targets.astype(np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    centre = y.mean(axis=0)
    x = (x - mean) / scale
    weight = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (y - centre)) / scale[:, None]  # [F, W]
    return weight.T.astype(np.float32), (centre - mean @ weight).astype(np.float32)


def linear_head(weight: np.ndarray, bias: np.ndarray, device: torch.device) -> nn.Linear:
    """Make a trainable float32 layer from a weight and a bias."""
    with torch.device("meta"):
        head = nn.Linear(weight.shape[1], weight.shape[0])
    head.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight)).to(device))
    head.bias = nn.Parameter(torch.from_numpy(np.ascontiguousarray(bias)).to(device))
    return head


def first_numbers(hidden_size: int, dimensions: int, device: torch.device) -> nn.Linear:
    """Make a head that keeps the first `dimensions` numbers of the pooled state."""
    return linear_head(
        np.eye(dimensions, hidden_size, dtype=np.float32), np.zeros(dimensions, dtype=np.float32), device
    )
