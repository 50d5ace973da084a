"""GradCache: the gradient of a loss over many texts, with the memory of one micro-batch (arXiv 2101.06983)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from unmask.encoder.prompts import Prompt
from unmask.training.training_model import TrainingModel


def backward_through(model: TrainingModel, prompts: Sequence[Prompt], loss_of: Callable[[Tensor], Tensor]) -> float:
    """Compute the gradients of a loss over the vectors of many prompts, with the memory of one micro-batch.

    GradCache (arXiv 2101.06983): vectors without gradients first, the loss's gradient with respect to them, then each
    pack again with it. The gradient is that of the direct computation, dropout included: each pack's random state is
    restored for its second forward. A process whose share is within `graph_tokens` keeps its graphs instead and
    computes each pack once.

    Several processes each encode their share of the prompts and see the vectors of all, so every one of them computes
    the whole loss; the sum of their parameters' gradients is the gradient of one process doing everything.

    Args:
        prompts: of the whole step, the same in every process.
        loss_of: vectors [len(prompts), depths * W] in the prompts' order -> a scalar.

    Returns:
        The loss.
    """
    micro_batches = model.micro_batches([len(prompt.ids) for prompt in prompts])
    gather = model.processes.gather
    order = [i for micro_batch in micro_batches for i in micro_batch]
    # With sharding only one graph can be alive: the second forward would free the weights of the first.
    fits = not model.sharded and sum(len(prompts[i].ids) for i in order) <= model.graph_tokens
    if len(micro_batches) == 1 or fits:
        vectors = [model.vectors_of(prompts, micro_batch) for micro_batch in micro_batches]
        # The vectors of one process are in the order of its micro-batches; the gathered ones, in the order of prompts.
        own = torch.cat(
            [torch.empty(0, model.depths * model.dimensions, device=model.device), *(v.detach() for v in vectors)]
        )
        gathered = gather(own, order, len(prompts)).requires_grad_()
        loss = loss_of(gathered)
        loss.backward()
        assert gathered.grad is not None
        for micro_batch in micro_batches:
            vectors.pop(0).backward(gathered.grad[micro_batch])  # frees its activations
        return float(loss.detach())
    randomness: list[_Randomness] = []
    parts = [torch.empty(0, model.depths * model.dimensions, device=model.device)]
    with torch.no_grad():
        for micro_batch in micro_batches:
            randomness.append(_Randomness(model.device))
            parts.append(model.vectors_of(prompts, micro_batch))
    gathered = gather(torch.cat(parts), order, len(prompts)).requires_grad_()
    loss = loss_of(gathered)
    loss.backward()
    assert gathered.grad is not None
    for micro_batch, random in zip(micro_batches, randomness, strict=True):
        with random.again():
            model.vectors_of(prompts, micro_batch).backward(gathered.grad[micro_batch])
    return float(loss.detach())


class _Randomness:
    """The state of the random generators at one moment, to repeat the same dropout."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        devices = [self._device] if self._cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield
