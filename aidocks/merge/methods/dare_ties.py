"""DARE, with the signs elected as in TIES."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import merge_method
from aidocks.merge.sparsify import at_random
from aidocks.merge.task_vectors import TaskVectorSettings, add_task_vectors, task_vector_parameters


@merge_method(
    "dare_ties",
    *task_vector_parameters(normalize=False, rescale=True),
    base="required",
    is_random=True,
    ignored=("int8_mask",),
)
def dare_ties(inputs: Inputs, density: Sequence[float], **settings: Unpack[TaskVectorSettings]) -> Merged:
    """Sum of randomly thinned changes that agree in sign (arXiv 2311.03099, section 3.2; 2306.01708, section 4.1).

    Differences are thinned and rescaled as by ``dare_linear``; of what is left, what has the sign of the weighted sum
    is added up, as by ``ties``.
    """
    masks = at_random(inputs, density)
    return add_task_vectors(inputs, masks, elect_signs=True, **settings)
