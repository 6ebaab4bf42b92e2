"""DARE: changes dropped at random, and the rest rescaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import merge_method
from aidocks.merge.sparsify import at_random
from aidocks.merge.task_vectors import TaskVectorSettings, add_task_vectors, task_vector_parameters


@merge_method(
    "dare_linear",
    *task_vector_parameters(normalize=False, rescale=True),
    base="required",
    is_random=True,
    ignored=("int8_mask",),
)
def dare_linear(inputs: Inputs, density: Sequence[float], **settings: Unpack[TaskVectorSettings]) -> Merged:
    """Weighted sum of randomly thinned changes (Yu et al., arXiv 2311.03099, section 3.2).

    Each value of each model's difference d_i from the base is kept with the probability ``density``:
    base + λ sum(w_i s_i d_i). ``rescale``: s_i is the L1 norm of d_i before over that after, so that this norm is kept
    exactly. (The paper's s_i is 1 / density, which keeps it on average.) Without it s_i is 1.
    """
    masks = at_random(inputs, density)
    return add_task_vectors(inputs, masks, elect_signs=False, **settings)
