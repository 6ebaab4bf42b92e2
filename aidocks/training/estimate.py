"""What a training will need, computed before it begins: memory of every process, operations, time.

Memory of what is kept between forward and backward pass: V. Korthikanti et al., Reducing Activation Recomputation in
Large Transformer Models (arXiv 2205.05198), equation 1, whose 34 sbh bytes a layer are here counted for layers whose
attention keeps no matrix of scores (fused kernels), with grouped keys and gated MLPs; with checkpointing, one input a
layer and one whole layer. Of states and their division: S. Rajbhandari et al., ZeRO (arXiv 1910.02054), section 3.
Operations: 2 for each parameter and token forward, and twice that backward, of which frozen weights need half (their
inputs' gradients, not their own); J. Kaplan et al. (arXiv 2001.08361), section 2.1, attention's own included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from aidocks.training.run import (
    ONLINE_METHODS,
    PREFERENCE_METHODS,
    WHOLE,
    AdapterSettings,
    Hyperparameters,
    LLMHyperparameters,
    Method,
    Precision,
)
from aidocks.training.shapes import ModelShape

Stage = Literal[0, 1, 2, 3]

#: Bytes of a stored value by type.
WIDTHS: dict[Precision, int] = {"float32": 4, "bfloat16": 2}
#: NF4 with doubly quantised scales: 4.127 bits a weight (arXiv 2305.14314, section 3).
_NF4_BYTES = 4.127 / 8
#: Optimiser state of a trained parameter, by the beginning of an optimiser's name; AdamW's two moments for others.
_STATE_BYTES = {
    "adafactor": 0.1,
    "sgd": 0,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion": 4,
}
_MOMENTS_BYTES = 8
#: Values of the head's tile that exist at once, per token: TRL projects through the vocabulary in tiles of so many.
_HEAD_TILE = 32_768
#: A process with torch, transformers, TRL and PEFT in it (resident); a CUDA context with its libraries.
CPU_PROCESS_BYTES, CUDA_PROCESS_BYTES = 800_000_000, 700_000_000
#: Share of a device's memory that may be planned with: the rest is fragmentation and what others need.
USABLE = 0.9


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to run a training, as far as its needs depend on it; kinds of training override what they do otherwise.

    Attributes:
        shape: The model.
        adapter: What is trained.
        hyper: Batch, length, optimiser.
        precision: Of frozen weights and of the computation.
        members: Processes.
        stage: Of ZeRO; None without DeepSpeed.
        offload: Whether what can be is in the memory of the machine instead of the GPU's.
        cuda: Whether it runs on GPUs.
        longest: Longest sequence of the data before it is cut, in tokens; None where it is not known.
    """

    shape: ModelShape
    adapter: AdapterSettings
    hyper: Hyperparameters
    precision: Precision
    members: int = 1
    stage: Stage | None = None
    offload: bool = False
    cuda: bool = False
    longest: int | None = None

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return self.shape.trained(self.adapter)

    @property
    def sequences(self) -> int:
        """Sequences of one forward pass."""
        return self.hyper.per_device_train_batch_size

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.hyper.max_length if self.longest is None else min(self.hyper.max_length, self.longest)

    @property
    def tokens(self) -> int:
        """Tokens whose activations exist at the same time."""
        return self.sequences * self.length

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied by."""
        return self.shape.multiplied

    @property
    def attended(self) -> float:
        """Tokens that a token looks at, on average."""
        return self.length / 2  # later ones are masked

    @property
    def head_bytes(self) -> int:
        """What the loss takes beside the layers' activations."""
        return 0

    @property
    def compares(self) -> bool:
        """Whether what it learns is compared with the untrained model's opinion."""
        return False

    @property
    def passes_beside(self) -> float:
        """Forward passes that a step takes beside its own."""
        return 0.0

    @property
    def calls_beside(self) -> float:
        """How often layers are called for these."""
        return self.passes_beside

    @property
    def written(self) -> int:
        """Tokens that the model writes in a step, one after another."""
        return 0

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages of ZeRO that are chosen from where the model does not fit otherwise."""
        # Weights in four bits cannot be divided.
        return (1, 2) if self.adapter.kind == "qlora" else (1, 2, 3)

    @property
    def instead(self) -> str:
        """What makes up for a smaller batch, for people."""
        return "raise `gradient_accumulation_steps` instead"

    @property
    def smaller(self) -> str | None:
        """An adapter that needs less memory, for people; None where there is none."""
        return "`adapter: lora`" if self.adapter.kind in WHOLE else None


@dataclass(frozen=True, kw_only=True)
class LLMSetup(Setup):
    """That of a language model.

    Attributes:
        method: Of the training.
    """

    method: Method
    hyper: LLMHyperparameters

    @property
    def sequences(self) -> int:
        """A pair of answers is two sequences, and so is a mismatched answer of KTO."""
        both = self.method in (*PREFERENCE_METHODS, "kto")
        return self.hyper.per_device_train_batch_size * (2 if both else 1)

    @property
    def length(self) -> int:
        if self.method in ONLINE_METHODS:
            prompt = self.hyper.max_prompt_length or self.hyper.max_length // 2
            return prompt + self.hyper.max_completion_length
        return self.hyper.max_length if self.hyper.packing else super().length

    @property
    def head_bytes(self) -> int:
        if self.method == "reward":
            return 0
        if self.method == "orpo":  # its trainer makes all logits: they, their logarithm, and their gradient
            return self.tokens * self.shape.vocabulary * (WIDTHS[self.precision] + 8)
        return self.tokens * min(self.shape.vocabulary, _HEAD_TILE) * 8

    @property
    def compares(self) -> bool:
        return self.method in ("dpo", "kto") or (self.method in ONLINE_METHODS and bool(self.hyper.beta))

    @property
    def passes_beside(self) -> float:
        # The reference's opinion; of an online method the writing of the answers, and theirs under the old policy.
        return {"dpo": 1.0, "kto": 1.5, "grpo": 2.0, "rloo": 2.0}.get(self.method, 0.0)

    @property
    def calls_beside(self) -> float:
        return {"dpo": 1.0, "kto": 2.0, "grpo": 1.0, "rloo": 1.0}.get(self.method, 0.0)

    @property
    def written(self) -> int:
        # An answer is written token by token, all answers of a step together.
        return self.hyper.max_completion_length if self.method in ONLINE_METHODS else 0

    @property
    def smaller(self) -> str | None:
        if self.cuda and self.adapter.kind in ("lora", "dora"):
            return "`adapter: qlora`"
        return super().smaller


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs at its peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.process


def memory_of(setup: Setup) -> Memory:
    """Return what one process needs on its device.

    With offload the optimiser's state and the gradients are not on it, and at stage 3 neither are the weights at rest.
    """
    trained, share = setup.trained, max(1, setup.members)
    stage = setup.stage or 0
    weights = _frozen_bytes(setup)
    # DeepSpeed computes in the type of the computation and keeps a float32 copy beside the moments.
    width = 4 if setup.stage is None else WIDTHS[setup.precision]
    own, gradient = float(width * trained), float(width * trained)
    optimizer = (_state_bytes(setup.hyper.optim) + (0 if setup.stage is None else 4)) * trained
    if stage >= 1:
        optimizer /= share
    if stage >= 2:
        gradient /= share
    if stage >= 3:
        # Divided at rest; while it is computed with, a layer is whole, and so is what is fetched ahead of it.
        largest = 2 * _bytes_of_a_layer(setup)
        weights, own = (
            (0 if setup.offload else weights / share) + largest,
            0 if setup.offload else own / share,
        )
    reference = _reference_bytes(setup) / (share if stage >= 3 else 1)
    if setup.offload:
        optimizer, gradient = 0, 0
    return Memory(
        weights=int(weights + own + reference),
        gradients=int(gradient),
        optimizer=int(optimizer),
        activations=activation_bytes(setup),
        process=CUDA_PROCESS_BYTES if setup.cuda else CPU_PROCESS_BYTES,
    )


def activation_bytes(setup: Setup) -> int:
    """Return what one forward pass keeps for the backward pass, and what its loss takes beside it."""
    tokens = setup.tokens
    shape, width = setup.shape, WIDTHS[setup.precision]
    # Inputs and outputs of the matrices of a layer; the keys' and values' share is theirs once each.
    values = 6 * shape.hidden + 2 * shape.keys + 4 * shape.mlp
    if setup.adapter.kind in WHOLE:
        values += 2 * shape.hidden  # normalised inputs, for the gradients of the norms' weights
    elif setup.adapter.kind in ("lora", "qlora", "dora"):
        values += 7 * setup.adapter.rank
    # Norms are computed in float32, whatever else is not.
    layer = tokens * (width * values + (0 if width == 4 else 2 * 4 * shape.hidden))
    if setup.hyper.gradient_checkpointing:
        kept = tokens * width * shape.hidden * shape.layers + layer
    else:
        # While a layer's gradients are computed, about as much as half of it exists once more.
        kept = layer * shape.layers + layer // 2
    return kept + setup.head_bytes


def _frozen_bytes(setup: Setup) -> float:
    """Return the bytes of the weights that stay as they are."""
    width = WIDTHS[setup.precision]
    if setup.adapter.kind == "full":
        return 0
    if setup.adapter.kind == "layers":
        return width * (setup.shape.parameters - setup.trained)
    if setup.adapter.kind == "qlora":
        linear = sum(rows * columns for rows, columns in (m.shape for m in setup.shape.linear))
        return _NF4_BYTES * linear + width * (setup.shape.parameters - linear)
    return width * setup.shape.parameters


def _reference_bytes(setup: Setup) -> int:
    """Return the bytes of the model that answers are compared with; with an adapter that is the base without it."""
    if not setup.compares or setup.adapter.kind not in WHOLE:
        return 0
    # It is loaded in the type of the trained one.
    return (4 if setup.adapter.kind == "full" else WIDTHS[setup.precision]) * setup.shape.parameters


def _bytes_of_a_layer(setup: Setup) -> float:
    outside = setup.shape.embedding
    within = (setup.shape.parameters - outside) / max(1, setup.shape.layers)
    return max(outside, within) * WIDTHS[setup.precision]


def _state_bytes(optim: str) -> float:
    return next((size for name, size in _STATE_BYTES.items() if optim.startswith(name)), _MOMENTS_BYTES)


def flops_per_token(setup: Setup) -> float:
    """Return the operations that one trained token costs, everything that the method does for it included."""
    forward = 2.0 * setup.multiplied + 4.0 * setup.shape.layers * setup.shape.hidden * setup.attended
    backward = (2 if setup.adapter.kind in WHOLE else 1) * forward
    again = forward if setup.hyper.gradient_checkpointing else 0
    return forward + backward + again + setup.passes_beside * forward


def calls_per_step(setup: Setup) -> float:
    """Return how often layers are called in an optimiser step of a process; going backward counts as two calls."""
    hyper = setup.hyper
    passes = 3.0 + (1 if hyper.gradient_checkpointing else 0) + setup.calls_beside
    return setup.shape.layers * (passes * hyper.gradient_accumulation_steps + setup.written)


def largest_batch(setup: Setup, available: int) -> int:
    """Return the largest batch of a process that fits, 0 if not even one example does."""
    low, high = 0, setup.hyper.per_device_train_batch_size
    while low < high:
        middle = (low + high + 1) // 2
        if memory_of(_with(setup, per_device_train_batch_size=middle)).total <= available:
            low = middle
        else:
            high = middle - 1
    return low


def longest_length(setup: Setup, available: int) -> int:
    """Return the longest example that fits with a batch of one, in tokens, a multiple of 64; 0 if none does."""
    low, high = 0, setup.hyper.max_length // 64
    while low < high:
        middle = (low + high + 1) // 2
        tried = _with(setup, per_device_train_batch_size=1, max_length=64 * middle)
        if memory_of(tried).total <= available:
            low = middle
        else:
            high = middle - 1
    return 64 * low


def _with(setup: Setup, **changes: object) -> Setup:
    return replace(setup, hyper=setup.hyper.model_copy(update=changes))
