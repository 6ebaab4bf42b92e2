"""Mean of any number of models on a sphere."""

from __future__ import annotations

from collections.abc import Sequence

from aidocks.errors import InvalidSpec
from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import Parameter, merge_method


@merge_method(
    "multislerp",
    Parameter("weight", float, scope="model", description="Weight of the model."),
    Parameter("normalize_weights", bool, True, description="Divide the weights by their sum."),
    Parameter(
        "eps",
        float,
        1e-8,
        at_least=0,
        description="Added to norms; a mean shorter than this has no direction.",
    ),
    base="optional",
)
def multislerp(inputs: Inputs, weight: Sequence[float], normalize_weights: bool, eps: float) -> Merged:
    """Weighted mean of directions, as long as the tensors are in the mean (Goddard, "Multi-SLERP", 2024).

    With the tensors x_i (their differences from the base, if there is one), u_i = x_i / |x_i| and
    m = sum(w_i u_i): (sum(w_i |x_i|)) m / |m|. (https://goddard.blog/posts/multislerp-wow-what-a-cool-idea goes to the
    tangent space at m and back. There the weighted mean of the u_i, projected, is 0: the way ends where it began.)
    A single model is returned as it is.

    Raises:
        InvalidSpec: The weights add up to 0, or the weighted directions do.
    """
    import torch

    w_N = torch.tensor(weight, dtype=torch.float64)
    if len(w_N) == 1:
        return inputs.combine_deltas([1.0])
    if normalize_weights:
        if w_N.sum() == 0:
            raise _no_mean(weight, "The weights of multislerp add up to 0")
        w_N = w_N / w_N.sum()
    g_NN = inputs.gram()
    norms_N = g_NN.diagonal().sqrt()
    m_N = w_N / (norms_N + eps)  # the mean direction, as coefficients of the tensors
    length = float((m_N @ g_NN @ m_N).clamp_min(0).sqrt())
    if length < eps or length == 0:
        if len(w_N) == 2:
            return inputs.combine_deltas(w_N.tolist())
        raise _no_mean(weight, f"The weighted directions of {inputs.name} add up to 0")
    return inputs.combine_deltas((m_N * ((w_N @ norms_N) / length)).tolist())


def _no_mean(weight: Sequence[float], what: str) -> InvalidSpec:
    return InvalidSpec(
        f"{what}: they have no mean.",
        field="parameters.weight",
        value=list(weight),
        hint="Choose weights that do not cancel each other.",
    )
