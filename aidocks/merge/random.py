"""Random numbers that depend on nothing but the seed, the tensor's name, the model and the value's position.

They come from a counter-based generator, which can start anywhere: Philox 4x64 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011, https://doi.org/10.1145/2063384.2063405). So a value meets the same number in
whatever block, thread, worker or process it is merged, and on every device: numbers are drawn on the CPU.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from aidocks.merge.inputs import Block, Inputs

#: Numbers of 32 bits that one step of the generator's counter gives.
_NUMBERS_A_STEP = 8


def stage_seed(seed: int, stage: str) -> int:
    """Return the seed of one of several merges of a request, so that a later one draws numbers of its own.

    Args:
        seed: The request's.
        stage: Name of the merge; empty for the last, whose seed is the request's.
    """
    if not stage:
        return seed
    digest = hashlib.sha256(f"{seed}\n{stage}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def random_words(inputs: Inputs, block: Block, model: int) -> torch.Tensor:
    """Return a random number for every value of a block: uniform over all int32, [R, C], on the inputs' device.

    Args:
        inputs: Their name and seed choose the sequence.
        block: Its place in the tensor chooses where the sequence is entered.
        model: Position of the model; each has a sequence of its own.
    """
    import numpy as np
    import torch

    digest = hashlib.sha256(f"{inputs.seed}\n{inputs.name}\n{model}".encode()).digest()
    height, width = block.values[0].shape
    begin = block.begin * width
    step, lead = divmod(begin, _NUMBERS_A_STEP)
    generator = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")).advance(step)
    pairs = generator.random_raw((lead + height * width + 1) // 2)
    # Little-endian whatever the machine: the lower half of a pair comes first.
    words = pairs.astype("<u8", copy=False).view("<i4")[lead : lead + height * width]
    return torch.from_numpy(words).reshape(height, width).to(inputs.device)
