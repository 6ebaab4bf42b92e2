"""TIES: trim, elect signs, merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import merge_method
from aidocks.merge.sparsify import largest
from aidocks.merge.task_vectors import TaskVectorSettings, add_task_vectors, task_vector_parameters


@merge_method(
    "ties",
    *task_vector_parameters(normalize=True, rescale=False),
    base="required",
    ignored=("int8_mask",),
)
def ties(inputs: Inputs, density: Sequence[float], **settings: Unpack[TaskVectorSettings]) -> Merged:
    """Mean of the largest changes that agree in sign (Yadav et al., arXiv 2306.01708, section 4.1).

    Of each model's difference d_i from the base the largest share ``density`` is kept. The sign of each value is that
    of the weighted sum (0 counts as +), and those that have it are averaged: base + λ sum(w_i d_i) / sum(w_i) over
    them; without ``normalize`` they are added up.
    """
    masks = largest(inputs, density)
    return add_task_vectors(inputs, masks, elect_signs=True, **settings)
