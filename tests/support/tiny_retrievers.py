"""Small models that find texts, made here: encoders, embedding models, rerankers and decoders with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Words of the test's texts; anything else is spelled in letters.
_TEXT = """
the a of in is are what who where when which how does did was were to and for with on by from city river
mountain capital country king queen ship engine wing flow heat pressure music painter song book winter summer
bread water fire stone tree bird fish horse road bridge house school teacher doctor garden market money
"""
WORDS = _TEXT.split()


def write_tokenizer(directory: Path) -> Any:
    """Write a WordPiece tokenizer of words and letters; return it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789.,?!'-:")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*specials, *letters, *(f"##{letter}" for letter in letters), *WORDS, "yes", "no"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=40))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    fast = BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=128)
    fast.save_pretrained(directory)
    return fast


def _config(tokenizer: Any, **overrides: Any) -> Any:
    from transformers import BertConfig

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    return BertConfig(**(sizes | overrides))


def make_encoder(directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a plain encoder (BERT with a masked-language-model head)."""
    import torch
    from transformers import BertForMaskedLM

    tokenizer = write_tokenizer(directory)
    torch.manual_seed(seed)
    BertForMaskedLM(_config(tokenizer, **overrides)).save_pretrained(directory)
    return directory


def make_embedder(directory: Path, seed: int = 0, prompts: dict[str, str] | None = None) -> Path:
    """Write a sentence-transformers model: BERT, mean pooling, vectors of length 1."""
    import torch
    from transformers import BertModel

    tokenizer = write_tokenizer(directory)
    torch.manual_seed(seed)
    BertModel(_config(tokenizer)).save_pretrained(directory)
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    told = {"prompts": prompts or {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(directory / "modules.json", modules)
    _write(directory / "1_Pooling" / "config.json", pooling)
    _write(directory / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    _write(directory / "config_sentence_transformers.json", told)
    (directory / "2_Normalize").mkdir()
    return directory


def make_reranker(directory: Path, seed: int = 0) -> Path:
    """Write a cross-encoder: BERT with one label."""
    import torch
    from transformers import BertForSequenceClassification

    tokenizer = write_tokenizer(directory)
    torch.manual_seed(seed)
    BertForSequenceClassification(_config(tokenizer, num_labels=1)).save_pretrained(directory)
    return directory


def make_decoder(directory: Path, seed: int = 0) -> Path:
    """Write a decoder (Qwen3) that knows the words yes and no."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = write_tokenizer(directory)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=64, max_position_embeddings=128, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def questions(count: int = 40) -> list[dict[str, Any]]:
    """Return queries, each with a right passage that shares its words, and a wrong one that shares some."""
    nouns = WORDS[WORDS.index("city") :]
    rows = []
    for number in range(count):
        one, other, third = (nouns[(number * step + step) % len(nouns)] for step in (1, 7, 11))
        rows.append(
            {
                "query": f"where is the {one} of the {other} {number}?",
                "pos": [f"the {one} of the {other} is by the {third} {number}."],
                "neg": [
                    f"the {one} was with a {third} in winter.",
                    f"a {other} and a {third} are for the queen.",
                ],
            }
        )
    return rows


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
