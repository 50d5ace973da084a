"""Probe the layers of an untrained decoder: how well a linear map predicts a teacher's vectors from each.

For every layer: mean-pool the states of some texts, fit a ridge regression to their targets, and measure the cosine on
held-out texts. From the layer where the curve stops rising, the rest of the decoder can be cut off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from unmask.disk import atomic_write
from unmask.encoder.pooling import pool
from unmask.encoder.unit_length import unit_length
from unmask.errors import UsageError
from unmask.training.dev import DevSets, GradedPairs, spearman
from unmask.training.device import choose_device
from unmask.training.head import ridge
from unmask.training.recipe import Recipe
from unmask.training.targets import FILE, Targets, targets_file
from unmask.training.train import distilled_texts, load_data
from unmask.training.training_model import TrainingModel

Count = Callable[[int], None]  # texts done just now


@dataclass(frozen=True)
class LayerScore:
    """Score of one layer; layer 0 is the token embedding.

    Attributes:
        cosine: mean cosine to the targets of texts that the map was not fitted on.
        graded: Spearman correlation, 0-100, on each set of graded pairs, by its name.
    """

    layer: int
    cosine: float
    graded: dict[str, float]


def probe_layers(
    model: TrainingModel,
    texts: Sequence[str],
    targets: np.ndarray,
    held_out: int,
    graded: Sequence[GradedPairs] = (),
    penalty: float = 400.0,
    progress: Count = lambda _: None,
) -> list[LayerScore]:
    """Score every layer.

    Args:
        model: the decoder as a recipe loads it.
        texts: texts to fit and to score on. targets: their target vectors, [N, W].
        held_out: number of texts at the end that are scored and not fitted.
        progress: called with the number of texts encoded just now.

    Raises:
        UsageError: fewer texts than are held out.
    """
    fitted = len(texts) - held_out
    if fitted < 1 or held_out < 1:
        raise UsageError(f"{len(texts)} texts, {held_out} of them held out: both parts need one at least")
    pairs = list(dict.fromkeys(text for each in graded for text in (*each.first, *each.second)))
    rows = {text: row for row, text in enumerate(pairs)}
    states = _pooled_by_layer(model, texts, progress)  # [layers + 1, N, hidden_size]
    pair_states = _pooled_by_layer(model, pairs, progress) if pairs else [np.empty((0, 0))] * len(states)
    scores = []
    for layer, (features, of_pairs) in enumerate(zip(states, pair_states, strict=True)):
        weight, bias = ridge(features[:fitted], targets[:fitted], penalty)
        cosine = float((unit_length(features[fitted:] @ weight.T + bias) * targets[fitted:]).sum(axis=1).mean())
        vectors = unit_length(of_pairs @ weight.T + bias) if pairs else of_pairs
        correlations = {}
        for each in graded:
            first, second = (vectors[[rows[text] for text in side]] for side in (each.first, each.second))
            correlations[each.name] = 100 * spearman((first * second).sum(axis=1), each.gold)
        scores.append(LayerScore(layer, cosine, correlations))
    return scores


def probe_recipe(
    recipe: Recipe,
    data: Path,
    output: Path,
    texts: int,
    held_out: int,
    causal: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, list[LayerScore]]:
    """Probe the base of a recipe with its data, teachers and dev sets; write probe.json, probe.svg and probe.png.

    Args:
        texts: number of the data's texts, chosen by the seed. Centring and PCA are fitted on all of them.
        held_out: number of these that are scored and not fitted.
        causal: probe with the causal mask on as well.

    Raises:
        UsageError: the recipe names no teacher.
    """
    if recipe.distillation is None:
        raise UsageError("probe-layers needs a teacher: the recipe has no [distillation]")
    if not 0 < held_out < texts:
        raise UsageError(f"--texts {texts}, --held-out {held_out}: hold out 1 or more, and fewer than there are")
    sets, _ = load_data(recipe, data, log)
    all_texts = distilled_texts(sets, recipe.contrastive.hard_negatives)
    chosen = [all_texts[i] for i in np.random.default_rng([recipe.seed, 4]).permutation(len(all_texts))[:texts]]
    output.mkdir(parents=True, exist_ok=True)
    targets = Targets(recipe.distillation, chosen, output / FILE, targets_file(recipe.distillation, data))
    graded = DevSets(recipe.dev, sets, data, seed=recipe.seed, max_bad_rows=recipe.max_bad_rows).graded
    curves: dict[str, list[LayerScore]] = {}
    for name, masked in (("mask off", False), *((("causal", True),) if causal else ())):
        log(f"{name}: {len(chosen)} texts through {recipe.base}")
        probed = msgspec.structs.replace(recipe, layers=None, lora=None, causal=masked)
        model = TrainingModel(probed, choose_device(recipe.device))
        curves[name] = probe_layers(model, chosen, targets.encode(chosen), held_out, graded)
    with atomic_write(output / "probe.json") as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(curves), indent=1) + b"\n")
    for ending in ("svg", "png"):
        draw_probe(curves, output / f"probe.{ending}")
    return curves


@torch.no_grad()
def _pooled_by_layer(model: TrainingModel, texts: Sequence[str], progress: Count) -> list[np.ndarray]:
    """Pool the states after the embedding and after each layer, through the final norm: [N, hidden_size] each."""
    model.decoder.eval()
    prompts = model.prompts(texts, "")
    size = (len(texts), model.decoder.shape.hidden_size)
    pooled = [np.empty(size, dtype=np.float32) for _ in range(model.decoder.shape.layers + 1)]
    for pack in model.packs([len(prompt.ids) for prompt in prompts]):
        chosen = [prompts[i] for i in pack]
        ids = torch.from_numpy(np.concatenate([prompt.ids for prompt in chosen])).to(model.device)
        states = model.decoder.states_by_layer(ids, [len(prompt.ids) for prompt in chosen])
        for layer, hidden in enumerate(states):
            pooled[layer][pack] = pool(hidden, chosen, model.encoder.pooling).cpu().numpy()
        progress(len(pack))
    return pooled


def draw_probe(curves: dict[str, list[LayerScore]], file: Path) -> None:
    """Plot the scores over the layers, as SVG or PNG by the file's ending.

    Args:
        curves: scores by the curve's name, such as "mask off" and "causal".
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(next(iter(curves.values()))[0].graded)
    figure, axes = plt.subplots(1, 1 + len(names), figsize=(5.2 * (1 + len(names)), 3.6), squeeze=False)
    for label, scores in curves.items():
        layers = [score.layer for score in scores]
        axes[0][0].plot(layers, [score.cosine for score in scores], marker="o", markersize=3, label=label)
        for axis, name in zip(axes[0][1:], names, strict=True):
            axis.plot(layers, [score.graded[name] for score in scores], marker="o", markersize=3, label=label)
    axes[0][0].set_title("cosine to the target, held-out texts")
    for axis, name in zip(axes[0][1:], names, strict=True):
        axis.set_title(f"{name}, Spearman")
    for axis in axes[0]:
        axis.set_xlabel("layers kept")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axis.legend(frameon=False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)
