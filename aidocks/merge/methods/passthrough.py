"""One model's tensors, as they are or scaled."""

from __future__ import annotations

from collections.abc import Sequence

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import Parameter, merge_method


@merge_method(
    "passthrough",
    Parameter("scale", float, 1.0, scope="input", description="Factor of the tensor."),
    models=(1, 1),
)
def passthrough(inputs: Inputs, scale: Sequence[float]) -> Merged:
    """The tensor, times ``scale``: for layers that are stacked as they are ("frankenmerges").

    With the scale 1 the same bits. With 0 for ``o_proj`` and ``down_proj`` a repeated layer adds nothing to the
    residual stream (block expansion, Wu et al., "LLaMA Pro", arXiv 2401.02415, section 3.1).
    """
    return inputs.combine(scale)
