"""What of a model is trained: PEFT's configurations of adapters, and which tensors stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from aidocks.errors import InvalidSpec
from aidocks.specs.patterns import compile_pattern
from aidocks.training.run import LOW_RANK, LLMTraining
from train.distributed import Place

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel

#: The layer of a reward model that makes a score of the last token's state, as transformers calls it.
SCORE = "score"
_NAMES_SHOWN = 12


def adapter_config(training: LLMTraining, model: PreTrainedModel) -> PeftConfig | None:
    """Return PEFT's configuration of the adapter; None where the model itself is trained.

    Args:
        training: What is trained.
        model: The base, a causal language model or (method ``reward``) a sequence classifier.

    Raises:
        InvalidSpec: The adapter names modules that the model does not have, or cannot be trained like this.
    """
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType

    adapter = training.adapter
    task = TaskType.SEQ_CLS if training.method == "reward" else TaskType.CAUSAL_LM
    if adapter.kind in LOW_RANK:
        whole = _require_modules(adapter.modules_to_save, _module_names(model), "modules_to_save")
        return LoraConfig(
            task_type=task,
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            use_rslora=adapter.rslora,
            use_dora=adapter.kind == "dora",
            target_modules=list(target_modules(model, adapter.target_modules)),
            # The score is made of nothing, so a reward model has to be saved with it.
            modules_to_save=[*whole, SCORE] if training.method == "reward" else whole or None,
            ensure_weight_tying=bool(_tied_names(model) & set(whole)),
        )
    if adapter.kind == "prompt_tuning":
        # Begins with embeddings of tokens, which the model understands, rather than with noise.
        return PromptTuningConfig(
            task_type=task, num_virtual_tokens=adapter.virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB"
        )
    if adapter.kind == "prefix_tuning":
        if training.hyper.gradient_checkpointing:
            raise InvalidSpec(
                "A prefix cannot be trained with gradient checkpointing: it stands in the cache of keys and values, "
                "which checkpointing does without.",
                field="gradient_checkpointing",
                value=True,
                hint="Set it to false, or use prompt_tuning.",
            )
        return PrefixTuningConfig(task_type=task, num_virtual_tokens=adapter.virtual_tokens)
    return None


def target_modules(model: PreTrainedModel, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the last names of the modules that get factors: those that are wanted, else all linear ones.

    The head is never among them: the losses multiply by its weight directly, so its factors would learn nothing.

    Raises:
        InvalidSpec: A name that no linear module has; names those that there are, the nearest first.
    """
    linear = _linear_names(model)
    if not wanted:
        return tuple(sorted(linear))
    return tuple(_require_modules(wanted, linear, "target_modules"))


def train_only(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Freeze a model but for the tensors in whose names a pattern is found.

    Args:
        model: The model.
        patterns: Regular expressions, or whole names, such as a spectral scan lists.

    Returns:
        The names of what is trained.

    Raises:
        InvalidSpec: A pattern is not allowed, or fits nothing.
    """
    # A head that is tied to the embedding has a name of its own, though it is the same tensor.
    names = dict(model.named_parameters(remove_duplicate=False))
    chosen: set[str] = set()
    for text in patterns:
        pattern = compile_pattern(text, "layers")
        found = {name for name in names if pattern.search(name)}
        if not found:
            raise InvalidSpec(
                f"No tensor has a name like {text!r}.",
                field="layers",
                value=text,
                hint=f"There are {_listed(_nearest(text, names))}.",
            )
        chosen |= found
    model.requires_grad_(False)
    for name in chosen:
        names[name].requires_grad_(True)
    return sorted(chosen)


def begin_prefix(model: Any, tokens: Sequence[int]) -> None:
    """Let a prefix begin as the keys and values of a text: noise, as PEFT has it, spoils what the model knows.

    Args:
        model: PEFT's, with a prefix that has learned nothing yet.
        tokens: Of some text; repeated where they are fewer than the prefix.
    """
    from peft import initialize_kv_prefix_from_past_key_values

    length = model.active_peft_config.num_virtual_tokens
    ids_1T = torch.tensor([(list(tokens) * length)[:length]], device=model.device)
    with torch.no_grad():
        cache = model.get_base_model()(input_ids=ids_1T, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)


def keep_exact(model: torch.nn.Module) -> None:
    """Bring what is trained to float32: in bfloat16 small steps are lost, for a weight has only eight bits."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def quantization(training: LLMTraining, place: Place) -> BitsAndBytesConfig | None:
    """Return how the frozen weights are quantised: NF4 with quantised scales, computed in bfloat16, for ``qlora``.

    Raises:
        InvalidSpec: There is no CUDA GPU, no bitsandbytes, or DeepSpeed would divide the weights among processes.
    """
    if training.adapter.kind != "qlora":
        return None
    if not place.gpu:
        obstacle = "it needs a CUDA GPU, and this worker has none"
    elif find_spec("bitsandbytes") is None:
        obstacle = "bitsandbytes is not installed on this worker (the extra `gpu` brings it)"
    elif training.zero_stage == 3:
        obstacle = "stage 3 of DeepSpeed cannot divide quantised weights"
    else:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    raise InvalidSpec(
        f"The adapter 'qlora' cannot be trained: {obstacle}.",
        field="adapter",
        value="qlora",
        hint="Use 'lora', which keeps the base as it is.",
    )


def _linear_names(model: PreTrainedModel) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    heads = {id(model.get_output_embeddings())} if model.get_output_embeddings() is not None else set()
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and id(module) not in heads and name != SCORE
    }


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Return the last names of embedding and head, where they share one weight."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return set()
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if any(module is end for end in ends)
    }


def _module_names(model: PreTrainedModel) -> set[str]:
    """Return the last names of modules that have weights of their own."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def _require_modules(wanted: Sequence[str], known: Iterable[str], field: str) -> list[str]:
    known = set(known)
    for name in wanted:
        if name not in known:
            raise InvalidSpec(
                f"{name!r} is no module of this model that can be trained like this.",
                field=field,
                value=name,
                hint=f"There are {_listed(_nearest(name, known))}.",
            )
    return list(dict.fromkeys(wanted))


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    def distance(other: str) -> tuple[float, str]:
        return -SequenceMatcher(None, name, other).ratio(), other

    return sorted(known, key=distance)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def adapter_arguments(training: LLMTraining, model: Any) -> dict[str, Any]:
    """Return the settings of a low-rank adapter under the names that unsloth shares with PEFT."""
    config = adapter_config(training, model)
    assert config is not None
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save")
    return {name: getattr(config, name) for name in names}
