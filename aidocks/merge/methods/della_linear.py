"""DELLA without the election of signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import merge_method
from aidocks.merge.sparsify import EPSILON, by_rank, remembered, require_probabilities
from aidocks.merge.task_vectors import TaskVectorSettings, add_task_vectors, task_vector_parameters


@merge_method(
    "della_linear",
    *task_vector_parameters(normalize=False, rescale=True),
    EPSILON,
    base="required",
    is_random=True,
    ignored=("int8_mask",),
    check=require_probabilities,
)
def della_linear(
    inputs: Inputs, density: Sequence[float], epsilon: Sequence[float], **settings: Unpack[TaskVectorSettings]
) -> Merged:
    """Weighted sum of changes thinned by rank (Deep et al., arXiv 2406.11617, section 3).

    Differences are thinned and rescaled as by ``della``: base + λ sum(w_i s_i d_i).
    """
    # Ranks cost more than all the rest: they are found once, for the norms and for the sum.
    masks = remembered(by_rank(inputs, density, epsilon))
    return add_task_vectors(inputs, masks, elect_signs=False, **settings)
