"""A linear probe: multinomial logistic regression, solved to its optimum.

LLM2Vec trains its probe as a linear layer behind dropout of 0.1, on unscaled states, with AdamW (learning rate 5e-4,
8 sentences a step, 1500 to 4000 steps). Such a probe stops before its optimum, at a point that depends on the seed,
the scale of the states and the number of steps. Here the same linear map has an L2 penalty in place of dropout (which
for such a model is an adaptive L2 penalty, arXiv 1307.1493), and states are scaled to variance 1. The optimum is then
unique: a score depends on the states alone, and two models differ because their states do.

Letters: n words, W width of a state, C classes.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

# The penalty: half the squared weights cost as much as the loss of this many words.
PENALTY_WORDS = 40.0
# Steps of L-BFGS. The loss is then within 1e-4 of its minimum on every task here, and no score moves by 0.1.
_STEPS = 40
# Typical share, near the optimum, of the curvature that a class has where its probability is its frequency.
_CURVATURE = 0.2
# Words per matrix product: states stay in float16 and are converted to float32 chunk by chunk.
_CHUNK = 8192


def fit_probe(states: np.ndarray, labels: np.ndarray, classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a probe to words and their labels.

    Args:
        states: [n, W], any type of float; may be memory-mapped.
        labels: int64 [n], each below `classes`.
        classes: size of the inventory, C. A label that never occurs here is never predicted.

    Returns:
        A function from states [m, W] to labels int64 [m].
    """
    chunks = list(_chunks(states))
    answers = torch.from_numpy(labels).split(_CHUNK)
    n, width = states.shape
    penalty = PENALTY_WORDS / n
    mean, scale, axes, variances = _moments(chunks, n)

    # The loss curves by f(1-f) x variance for a class of frequency f, over four orders of magnitude, and L-BFGS
    # would converge slowly. In the principal axes of the states, with each weight in units of its own curvature, the
    # loss is nearly isotropic: 40 steps instead of hundreds, to the same optimum.
    frequency = torch.bincount(torch.from_numpy(labels), minlength=classes) / n
    curvature = _CURVATURE * frequency * (1 - frequency)  # [C]
    unit = (variances[:, None] * curvature + penalty).rsqrt()  # [W, C]
    bias_unit = (curvature + 1 / n).rsqrt()  # [C]
    point = torch.zeros(width + 1, classes)  # weights, then biases, in those units

    def affine() -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight [W, C] and bias [C] for unscaled states."""
        weight = axes @ (point[:-1] * unit) * scale[:, None]
        return weight, point[-1] * bias_unit - mean @ weight

    def loss() -> float:
        weight, bias = affine()
        total = 0.0
        gradient, bias_gradient = torch.zeros(width, classes), torch.zeros(classes)
        for chunk, answer in zip(chunks, answers, strict=True):
            wide = chunk.float()
            log = F.log_softmax(wide @ weight + bias, dim=1)  # [chunk, C]
            total -= float(log.gather(1, answer[:, None]).sum(dtype=torch.float64))
            error = log.exp_().scatter_add_(1, answer[:, None], torch.full((len(answer), 1), -1.0))
            gradient += wide.T @ error
            bias_gradient += error.sum(0)
        gradient = axes.T @ ((gradient - mean[:, None] * bias_gradient) * scale[:, None])  # by standardised weights
        weights = point[:-1] * unit
        point.grad = torch.cat(((gradient / n + penalty * weights) * unit, (bias_gradient / n * bias_unit)[None]))
        return total / n + penalty / 2 * float(weights.double().square().sum())

    torch.optim.LBFGS(
        [point], max_iter=_STEPS, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    ).step(loss)
    weight, bias = affine()

    def predict(states: np.ndarray) -> np.ndarray:
        labels = [(chunk.float() @ weight + bias).argmax(1) for chunk in _chunks(states)]
        return torch.cat(labels).numpy() if labels else np.empty(0, dtype=np.int64)

    return predict


def _chunks(states: np.ndarray) -> Iterator[torch.Tensor]:
    """Yield copies in memory, [_CHUNK, W] each, in the dtype of the states."""
    for start in range(0, len(states), _CHUNK):
        yield torch.from_numpy(np.array(states[start : start + _CHUNK]))


def _moments(chunks: list[torch.Tensor], n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mean and 1 / standard deviation of the states, both [W]; and, of the standardised states, the principal
    axes [W, W] (columns) and the variances along them [W].
    """
    mean = torch.stack([chunk.sum(0, dtype=torch.float64) for chunk in chunks]).sum(0) / n
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for chunk in chunks:
        centred = chunk.float() - mean.float()
        covariance += centred.T @ centred
    covariance /= n
    scale = 1 / (covariance.diagonal().sqrt() + 1e-6)
    variances, axes = torch.linalg.eigh(scale[:, None] * covariance * scale)
    return mean.float(), scale.float(), axes.float(), variances.clamp(min=0).float()
