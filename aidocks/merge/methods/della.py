"""DELLA: changes dropped at random, the small ones more often; signs elected as in TIES."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import merge_method
from aidocks.merge.sparsify import EPSILON, by_rank, remembered, require_probabilities
from aidocks.merge.task_vectors import TaskVectorSettings, add_task_vectors, task_vector_parameters


@merge_method(
    "della",
    *task_vector_parameters(normalize=True, rescale=True),
    EPSILON,
    base="required",
    is_random=True,
    ignored=("int8_mask",),
    check=require_probabilities,
)
def della(
    inputs: Inputs, density: Sequence[float], epsilon: Sequence[float], **settings: Unpack[TaskVectorSettings]
) -> Merged:
    """Mean of changes thinned by rank that agree in sign (Deep et al., arXiv 2406.11617, section 3).

    Each value of each model's difference from the base is kept with a probability that rises with the rank of its
    magnitude in its row, from density - epsilon to density + epsilon. What is kept is rescaled as by ``dare_linear``,
    (the paper divides each value by its probability), and averaged as by ``ties``.
    """
    # Ranks cost more than all the rest: they are found once, for the norms and for the sum.
    masks = remembered(by_rank(inputs, density, epsilon))
    return add_task_vectors(inputs, masks, elect_signs=True, **settings)
