"""Model breadcrumbs: without outliers and without noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import merge_method
from aidocks.merge.sparsify import GAMMA, without_outliers
from aidocks.merge.task_vectors import TaskVectorSettings, add_task_vectors, task_vector_parameters


@merge_method(
    "breadcrumbs",
    *task_vector_parameters(normalize=False, rescale=False),
    GAMMA,
    base="required",
    ignored=("int8_mask",),
)
def breadcrumbs(
    inputs: Inputs, density: Sequence[float], gamma: Sequence[float], **settings: Unpack[TaskVectorSettings]
) -> Merged:
    """Weighted sum of the middle of the changes (Davari and Belilovsky, arXiv 2312.06795, section 3).

    Of each model's difference d_i from the base the largest share ``gamma`` is left out, and the smallest, so that the
    share ``density`` is kept: base + λ sum(w_i d_i).
    """
    masks = without_outliers(inputs, density, gamma)
    return add_task_vectors(inputs, masks, elect_signs=False, **settings)
