"""Which adapters are not trained, where `train.freeze` asks for it.

`speed` freezes the lowest layers: backward ends above them, nothing is kept for it of them, and nothing
of them is computed twice. `memory` freezes the layers whose adapters' gradients matter least, wherever
they lie: they have no gradients and no optimizer state. By what "least" is measured: the squared norm
of a layer's gradient, summed over the run's first batches. That is the trace of the layer's empirical
Fisher information, which says how much the loss changes with its weights (Sung et al. 2021,
arXiv:2111.09839, train the weights where it is largest; Lee et al. 2022, arXiv:2210.11466, choose layers
by gradient norms). As all layers' adapters have the same number of weights, sums compare.

How many layers are frozen is the user's to say, so a Plan and its estimate know it before the run. Which
ones, the gradients say, at the run's start; until then a Plan names as many as cost the most memory:
none of them at the bottom.

This module imports no torch.
"""

import math
from collections.abc import Sequence

from fitlora.params import TrainParams

# Effective batches whose gradients are summed before the first update.
SURVEYED_BATCHES = 4
# When memory runs out in a run that freezes, no more than this share of the layers is frozen: what
# benchmarks/precision_and_freezing.py measured the cost of.
MOST_FROZEN = 0.75


def planned(train: TrainParams, layers: int) -> tuple[int, ...]:
    """The layers that a Plan freezes; of `memory`, in the place of those that will be chosen."""
    if train.freeze == "off":
        return ()
    count = min(layers - 1, round(train.freeze_share * layers))
    lowest = 0 if train.freeze == "speed" else 1
    return tuple(range(lowest, lowest + count))


def least_first(scores: Sequence[float]) -> tuple[int, ...]:
    """The layers in the order in which they freeze. scores: of each, bottom up."""
    return tuple(sorted(range(len(scores)), key=lambda layer: (scores[layer], layer)))


def more_frozen(frozen: Sequence[int], order: Sequence[int]) -> tuple[int, ...] | None:
    """With half of the layers that learn frozen too, the first of `order`; None where it is enough.

    order: of all layers, as they freeze.
    """
    most = math.floor(MOST_FROZEN * len(order))
    learning = len(order) - len(frozen)
    count = min(most, len(frozen) + learning // 2)
    if count <= len(frozen):
        return None
    rest = [layer for layer in order if layer not in frozen]
    return tuple(sorted([*frozen, *rest[: count - len(frozen)]]))
