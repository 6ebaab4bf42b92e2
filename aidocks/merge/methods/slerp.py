"""Spherical linear interpolation of two models."""

from __future__ import annotations

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import Parameter, merge_method
from aidocks.merge.spherical import cosine, slerp_coefficients

#: Norms up to it count as 1.
_LEAST_NORM = 1e-8
#: Above it a pair is taken for parallel, below its negative for opposite.
_STRAIGHT = 0.9995


@merge_method(
    "slerp",
    Parameter("t", float, description="Where between the base (0) and the other model (1)."),
    base="required",
    models=(1, 1),
)
def slerp(inputs: Inputs, t: float) -> Merged:
    """Point on the arc between two models (Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985).

    With θ the angle between the base a and the other b, each as one vector: (sin((1 - t) θ) a + sin(t θ) b) / sin θ;
    (1 - t) a + t b where |cos θ| > 0.9995. t = 0 is the base, t = 1 the other, bit for bit.
    """
    gram = inputs.gram(lambda block: (block.base, *block.models))
    norms = gram.diagonal().sqrt()
    norms = norms.masked_fill(norms <= _LEAST_NORM, 1)
    cos = cosine(gram[0, 1], norms[0], norms[1])
    base, other = slerp_coefficients(cos, t, cos.abs() > _STRAIGHT)
    return inputs.combine([float(base if n == inputs.base_index else other) for n in range(2)])
