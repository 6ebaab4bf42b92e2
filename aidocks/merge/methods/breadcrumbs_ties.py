"""Model breadcrumbs, with the signs elected as in TIES."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import merge_method
from aidocks.merge.sparsify import GAMMA, without_outliers
from aidocks.merge.task_vectors import TaskVectorSettings, add_task_vectors, task_vector_parameters


@merge_method(
    "breadcrumbs_ties",
    *task_vector_parameters(normalize=False, rescale=False),
    GAMMA,
    base="required",
    ignored=("int8_mask",),
)
def breadcrumbs_ties(
    inputs: Inputs, density: Sequence[float], gamma: Sequence[float], **settings: Unpack[TaskVectorSettings]
) -> Merged:
    """Sum of the middle of the changes that agree in sign (arXiv 2312.06795, section 3; 2306.01708, section 4.1).

    Differences are thinned as by ``breadcrumbs``; of what is left, what has the sign of the weighted sum is added up,
    as by ``ties``.
    """
    masks = without_outliers(inputs, density, gamma)
    return add_task_vectors(inputs, masks, elect_signs=True, **settings)
