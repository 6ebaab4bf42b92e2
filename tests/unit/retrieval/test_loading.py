"""Models loaded: the numbers of sentence-transformers and PEFT, and nothing that was made by chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aidocks.errors import CorruptCheckpoint, IncompatibleModels, MissingExtra, UnsafeCheckpoint
from aidocks.models.registry import Registry
from aidocks.models.resolve import ModelResolver
from aidocks.plan import UnitContext
from aidocks.retrieval.batching import in_batches
from aidocks.retrieval.embedder import Embedder, open_embedder
from aidocks.retrieval.loading import load_cross_encoder, load_embedding_model
from aidocks.retrieval.opening import Choices, open_retriever
from aidocks.retrieval.reranker import Reranker, open_reranker
from aidocks.training.retriever import Prompts, Retriever, RetrieverKind
from tests.support.tiny_retrievers import (
    make_decoder,
    make_embedder,
    make_encoder,
    make_reranker,
    questions,
    write_tokenizer,
)

ROWS = questions(12)
TEXTS = [row["query"] for row in ROWS] + [" ".join(row["pos"] * 3) for row in ROWS] + ["a"]
PAIRS = [(row["query"], passage) for row in ROWS for passage in (*row["pos"], *row["neg"])]


@pytest.fixture
def resolver(tmp_path: Path) -> ModelResolver:
    return ModelResolver(tmp_path / "registry", [tmp_path])


def open_it(directory: Path, kind: RetrieverKind, resolver: ModelResolver, **choices: Any) -> Retriever:
    return open_retriever(str(directory), kind, resolver, Choices(**choices), field="model")


def of_sentence_transformers(directory: Path, texts: list[str]) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directory), device="cpu", local_files_only=True).encode(texts)


def length_one(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_vectors_are_those_of_sentence_transformers(tmp_path: Path, resolver: ModelResolver) -> None:
    own, plain, decoder = (
        make_embedder(tmp_path / "e"),
        make_encoder(tmp_path / "b"),
        make_decoder(tmp_path / "d"),
    )

    for directory in (own, plain, decoder):
        vectors = Embedder(open_it(directory, "embedding", resolver), "cpu").embed(TEXTS)
        expected = length_one(of_sentence_transformers(directory, TEXTS))

        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_scores_are_those_of_sentence_transformers(tmp_path: Path, resolver: ModelResolver) -> None:
    from sentence_transformers import CrossEncoder

    for directory in (make_reranker(tmp_path / "r"), make_decoder(tmp_path / "d")):
        scores = Reranker(open_it(directory, "reranker", resolver), "cpu").scores(PAIRS)
        plain = CrossEncoder(str(directory), device="cpu", local_files_only=True)
        expected = plain.predict(PAIRS, activation_fn=torch.nn.Identity())

        np.testing.assert_allclose(scores, expected, atol=2e-6)
        assert np.ptp(scores) > 0


def test_prompts_cuts_and_orders(tmp_path: Path, resolver: ModelResolver) -> None:
    directory = make_embedder(tmp_path / "e", prompts={"query": "who: ", "passage": "the "})
    embedder = Embedder(open_it(directory, "embedding", resolver, max_length=12), "cpu")
    long = " ".join(["city"] * 50)

    assert embedder.count_tokens([long, "a"]) == [12, 3]
    assert embedder.count_tokens(["a"], "query") == [5]
    assert embedder.count_tokens(["a"], prompt="the king ") == [5]
    np.testing.assert_allclose(embedder.embed(["a"], "query"), embedder.embed(["who: a"]), atol=1e-6)
    np.testing.assert_allclose(embedder.embed(["a"], "passage"), embedder.embed(["the a"]), atol=1e-6)
    np.testing.assert_allclose(embedder.embed(TEXTS)[::-1], embedder.embed(TEXTS[::-1]), atol=1e-6)
    assert embedder.embed([]).shape == (0, 32)
    assert embedder.model.prompts == {"query": "who: ", "passage": "the ", "document": "the "}


def test_normalisation_is_as_asked_for(tmp_path: Path, resolver: ModelResolver) -> None:
    directory = make_embedder(tmp_path / "e")
    raw = Embedder(open_it(directory, "embedding", resolver, normalize=False), "cpu").embed(TEXTS)
    unit = Embedder(open_it(directory, "embedding", resolver), "cpu").embed(TEXTS)

    assert abs(np.linalg.norm(raw, axis=1) - 1).max() > 0.1
    np.testing.assert_allclose(length_one(raw), unit, atol=1e-6)


def test_a_new_head_depends_on_the_seed_alone(tmp_path: Path, resolver: ModelResolver) -> None:
    retriever = open_it(make_encoder(tmp_path / "b"), "reranker", resolver)

    seeded = retriever.model_copy(update={"seed": 1})
    first = Reranker(seeded, "cpu").scores(PAIRS)
    torch.manual_seed(12345)
    again = Reranker(seeded, "cpu").scores(PAIRS)
    other = Reranker(retriever, "cpu").scores(PAIRS)

    np.testing.assert_array_equal(first, again)
    assert abs(first - other).max() > 1e-4


def test_what_lacks_weights_is_refused(tmp_path: Path, resolver: ModelResolver) -> None:
    from safetensors.torch import load_file, save_file

    for make, kind, part in (
        (make_reranker, "reranker", "classifier.weight"),
        (make_embedder, "embedding", "encoder.layer.1.output.dense.weight"),
        (make_encoder, "reranker", "bert.encoder.layer.1.output.dense.weight"),
        (make_decoder, "embedding", "model.layers.0.mlp.up_proj.weight"),
    ):
        directory = make(tmp_path / f"{kind}-{part}")
        stored = load_file(directory / "model.safetensors")
        del stored[part]
        save_file(stored, directory / "model.safetensors", {"format": "pt"})
        retriever = open_it(directory, kind, resolver)  # type: ignore[arg-type]

        with pytest.raises(CorruptCheckpoint, match=part.rpartition("layer")[2].replace(".", r"\.")):
            Embedder(retriever, "cpu") if kind == "embedding" else Reranker(retriever, "cpu")


def test_the_guard_stands_at_the_loading_too(tmp_path: Path) -> None:
    directory = make_encoder(tmp_path / "b")
    config = json.loads((directory / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling.JinaBertModel"}, "position_embedding_type": "alibi"}
    (directory / "config.json").write_text(json.dumps(config))
    retriever = Retriever(kind="embedding", name="m", model=directory, pooling="mean", max_length=64)

    with pytest.raises(UnsafeCheckpoint, match=r"\(alibi\)"):
        load_embedding_model(retriever, "cpu", torch.float32)


def make_adapter(network: Any, directory: Path, task: str, **settings: Any) -> Any:
    """Save an adapter with random factors, and a random head where it has one; return PEFT's model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    targets = settings.pop("target_modules", ["query", "value", "dense"])
    config = LoraConfig(task_type=task, r=4, target_modules=targets, **settings)
    model = get_peft_model(network, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(0, 0.3)
            if "modules_to_save" in name:
                parameter.normal_(0, 0.5)
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_an_embedding_model(tmp_path: Path, resolver: ModelResolver, use_dora: bool) -> None:
    from transformers import AutoModel

    base = make_embedder(tmp_path / "base")
    trained = make_adapter(
        AutoModel.from_pretrained(base),
        tmp_path / "a",
        "FEATURE_EXTRACTION",
        use_dora=use_dora,
        exclude_modules=".*pooler.*",
    )
    retriever = open_it(tmp_path / "a", "embedding", resolver)
    embedder = Embedder(retriever, "cpu")

    tokens = embedder.model.tokenizer([TEXTS[0]], return_tensors="pt")
    with torch.inference_mode():
        expected = trained(**tokens).last_hidden_state.mean(1).numpy()
    vectors = embedder.embed(TEXTS)

    assert (retriever.model, retriever.adapter) == (base, tmp_path / "a")
    np.testing.assert_allclose(vectors[:1], length_one(expected), atol=2e-5)
    assert abs(vectors - of_sentence_transformers(base, TEXTS)).max() > 0.01


def test_the_head_of_a_rerankers_adapter_is_the_trained_one(tmp_path: Path, resolver: ModelResolver) -> None:
    from transformers import AutoModelForSequenceClassification

    base = make_reranker(tmp_path / "base")
    network = AutoModelForSequenceClassification.from_pretrained(base)
    trained = make_adapter(network, tmp_path / "a", "SEQ_CLS", modules_to_save=["classifier"])
    reranker = Reranker(open_it(tmp_path / "a", "reranker", resolver), "cpu")

    tokens = reranker.model.tokenizer(*zip(*PAIRS, strict=True), return_tensors="pt", padding=True)
    with torch.inference_mode():
        expected = trained(**tokens).logits[:, 0].numpy()

    np.testing.assert_allclose(reranker.scores(PAIRS), expected, atol=2e-5)
    with pytest.raises(IncompatibleModels, match="is a reranker"):
        open_it(tmp_path / "a", "embedding", resolver)


def test_an_adapter_without_its_head_is_refused(tmp_path: Path, resolver: ModelResolver) -> None:
    from transformers import AutoModelForSequenceClassification

    base = make_encoder(tmp_path / "base")
    for number, modules in enumerate((["classifier"], ["classifier", "pooler"])):
        network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        make_adapter(
            network,
            tmp_path / f"a{number}",
            "SEQ_CLS",
            modules_to_save=modules,
            target_modules=["query", "value"],
        )
    with pytest.raises(CorruptCheckpoint, match="pooler"):
        Reranker(open_it(tmp_path / "a0", "reranker", resolver), "cpu")

    # With all of the head it does not matter that the base has none.
    whole = open_it(tmp_path / "a1", "reranker", resolver)
    first, second = (
        Reranker(whole.model_copy(update={"seed": seed}), "cpu").scores(PAIRS) for seed in (0, 1)
    )
    np.testing.assert_array_equal(first, second)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, resolver: ModelResolver) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel

    base = make_embedder(tmp_path / "base")
    make_adapter(
        AutoModel.from_pretrained(base), tmp_path / "a", "FEATURE_EXTRACTION", target_modules=["query"]
    )
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    strange = {name.replace("layer.1", "layer.9"): tensor for name, tensor in stored.items()}
    save_file(strange, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(IncompatibleModels, match=r"layer\.9"):
        Embedder(open_it(tmp_path / "a", "embedding", resolver), "cpu")

    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somebody/elses"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleModels, match="was trained on 'somebody/elses'"):
        open_it(tmp_path / "a", "embedding", resolver)


def test_an_adapter_that_was_trained_here_knows_its_base(tmp_path: Path) -> None:
    from transformers import AutoModel

    registry = Registry(tmp_path / "registry")
    resolver = ModelResolver(tmp_path / "registry", [tmp_path / "mine"])
    base = make_embedder(tmp_path / "mine" / "base")
    # Another model of the directory's name is not meant.
    registry.import_checkpoint("base", make_embedder(tmp_path / "other", seed=5))
    network = AutoModel.from_pretrained(base)
    make_adapter(network, tmp_path / "a", "FEATURE_EXTRACTION", target_modules=["query"])
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base"}))
    registry.import_checkpoint("imported", tmp_path / "a")
    registry.import_checkpoint("trained", tmp_path / "a")
    manifest = registry.manifest("trained")
    parent = manifest.parents[0].model_copy(update={"field": "base_model", "reference": str(base)})
    written = manifest.model_copy(update={"parents": (parent,)}).model_dump_json()
    (registry.path("trained") / "aidocks.json").write_text(written)

    opened = {
        name: open_retriever(name, "embedding", resolver, field="model") for name in ("imported", "trained")
    }

    assert opened["imported"].model == registry.path("base")
    assert opened["trained"].model == base
    (base / "config.json").rename(tmp_path / "config.json")
    base.rename(tmp_path / "mine" / "gone")
    with pytest.raises(IncompatibleModels, match="was trained on 'base', which is not to be had") as refused:
        open_retriever("trained", "embedding", resolver, field="model")
    assert str(tmp_path) not in str(refused.value)


def test_what_libraries_say_names_no_directories(
    tmp_path: Path, resolver: ModelResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_embedder(tmp_path / "e")
    retriever = open_it(directory, "embedding", resolver).model_copy(update={"name": "mine"})

    def load(path: str, **_: Any) -> Any:
        raise OSError(f"there is no vocab.txt in {path}/")

    monkeypatch.setattr("aidocks.retrieval.loading.Transformer.load", load)
    expected = "mine does not load as an embedding model: there is no vocab.txt in e/"
    with pytest.raises(IncompatibleModels, match=expected):
        load_embedding_model(retriever, "cpu", torch.float32)


def test_a_missing_library_is_named(
    tmp_path: Path, resolver: ModelResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aidocks.retrieval import libraries

    retriever = open_it(make_embedder(tmp_path / "e"), "embedding", resolver)
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == "peft" else name)
    with pytest.raises(MissingExtra, match=r"need peft.*aidocks\[local\]"):
        Embedder(retriever, "cpu")


def test_what_a_gpu_has_no_room_for_is_computed_in_halves() -> None:
    computed: list[list[int]] = []

    def compute(chosen: list[int]) -> None:
        if len(chosen) > 3:
            raise torch.OutOfMemoryError
        computed.append(chosen)

    in_batches([100] * 10, "cuda", compute)
    assert sorted(number for chosen in computed for number in chosen) == list(range(10))
    assert max(map(len, computed)) == 2
    with pytest.raises(torch.OutOfMemoryError):
        in_batches([100], "cuda", lambda _: compute([0] * 4))


def test_an_adapter_with_modules_of_its_own(tmp_path: Path, resolver: ModelResolver) -> None:
    from transformers import AutoModel

    base = make_encoder(tmp_path / "base")
    make_adapter(
        AutoModel.from_pretrained(base), tmp_path / "a", "FEATURE_EXTRACTION", target_modules=["query"]
    )
    beside = make_embedder(tmp_path / "other", prompts={"query": "q: "})
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (tmp_path / "a" / name).write_bytes((beside / name).read_bytes())
    (tmp_path / "a" / "1_Pooling").mkdir()
    (tmp_path / "a" / "1_Pooling" / "config.json").write_text(
        json.dumps({"embedding_dimension": 32, "pooling_mode": "cls"})
    )
    retriever = open_it(tmp_path / "a", "embedding", resolver)
    model = load_embedding_model(retriever, "cpu", torch.float32)

    assert (retriever.pooling, retriever.prompts.query, retriever.max_length) == (None, "q: ", 64)
    assert model[1].pooling_mode == "cls"


def make_jina(directory: Path) -> Path:
    """A model as Jina v3 is in transformers, with two adapters for retrieval and one for another task."""
    from transformers import AutoModel, JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

    tokenizer = write_tokenizer(directory)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(
        directory
    )
    for number, task in enumerate(("retrieval_query", "retrieval_passage", "separation")):
        network = AutoModel.from_pretrained(directory)
        targets = ["o_proj", "fc1", "fc2"][: number + 1]
        make_adapter(network, directory / task, "FEATURE_EXTRACTION", target_modules=targets)
    return directory


def test_the_adapters_for_tasks_of_jina_v3(tmp_path: Path, resolver: ModelResolver) -> None:
    directory = make_jina(tmp_path / "jina")
    plain = Embedder(open_it(directory, "embedding", resolver), "cpu").embed(TEXTS)
    single = {
        task: Embedder(open_it(directory, "embedding", resolver, task=task), "cpu").embed(TEXTS)
        for task in ("retrieval.query", "retrieval_passage", "separation")
    }
    both = Embedder(open_it(directory, "embedding", resolver, task="retrieval"), "cpu")

    np.testing.assert_allclose(both.embed(TEXTS, "query"), single["retrieval.query"], atol=1e-6)
    np.testing.assert_allclose(both.embed(TEXTS, "passage"), single["retrieval_passage"], atol=1e-6)
    np.testing.assert_allclose(both.embed(TEXTS, "query"), single["retrieval.query"], atol=1e-6)
    different = [plain, *single.values()]
    assert all(abs(a - b).max() > 0.01 for n, a in enumerate(different) for b in different[:n])
    with pytest.raises(Exception, match="retrieval, retrieval_passage, retrieval_query, separation"):
        open_it(directory, "embedding", resolver, task="poetry")


def test_the_files_of_nomic_bert_with_its_authors_code_map(tmp_path: Path, resolver: ModelResolver) -> None:
    from transformers import NomicBertConfig, NomicBertModel

    directory = tmp_path / "nomic"
    tokenizer = write_tokenizer(directory)
    config = NomicBertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    NomicBertModel(config).save_pretrained(directory)
    told = json.loads((directory / "config.json").read_text())
    told["auto_map"] = {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"}
    (directory / "config.json").write_text(json.dumps(told))

    vectors = Embedder(open_it(directory, "embedding", resolver), "cpu").embed(TEXTS)

    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


_OWN_CODE = """
from transformers import BertModel
class DoubleBert(BertModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output
"""


def test_code_is_run_only_where_an_admin_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = make_embedder(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling_double.DoubleBert"}, "position_embedding_type": "alibi"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_double.py").write_text(_OWN_CODE)
    registry = Registry(tmp_path / "registry")
    registry.import_checkpoint("double", source, code=True)
    registry.import_checkpoint("single", make_embedder(tmp_path / "plain"))
    resolver = ModelResolver(tmp_path / "registry", [])

    for allowed in (frozenset(), frozenset({"single", "some/double"})):
        with pytest.raises(UnsafeCheckpoint, match="Python code"):
            open_retriever("double", "embedding", resolver, field="model", remote_code=allowed)
    retriever = open_retriever("double", "embedding", resolver, field="model", remote_code={"double"})
    plain = open_retriever("single", "embedding", resolver, field="model", remote_code={"double"})

    assert (retriever.remote_code, plain.remote_code) == (True, False)
    vectors = Embedder(retriever, "cpu").embed(TEXTS)
    np.testing.assert_allclose(vectors[:, ::-1], Embedder(plain, "cpu").embed(TEXTS), atol=1e-6)


def test_the_registry_carries_modules_and_tasks(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    resolver = ModelResolver(tmp_path / "registry", [])
    embedder = make_embedder(tmp_path / "e", prompts={"query": "q: "})
    (embedder / "onnx").mkdir()
    (embedder / "onnx" / "config.json").write_text("{}")
    registry.import_checkpoint("mini", embedder)
    registry.import_checkpoint("linked", embedder, copy=False)
    registry.import_checkpoint("jina", make_jina(tmp_path / "jina"))

    files = {file.path for file in registry.manifest("mini").files}
    retriever = open_retriever("mini", "embedding", resolver, field="model")
    task = open_retriever("jina", "embedding", resolver, Choices(task="retrieval"), field="model")

    assert {"1_Pooling/config.json", "modules.json", "config_sentence_transformers.json"} <= files
    assert not [name for name in files if name.startswith("onnx")]
    assert (registry.path("linked") / "1_Pooling" / "config.json").is_file()
    vectors = Embedder(retriever, "cpu").embed(TEXTS)
    np.testing.assert_allclose(vectors, of_sentence_transformers(embedder, TEXTS), atol=2e-6)
    assert Embedder(task, "cpu").embed(["a"], "query").shape == (1, 32)


def test_a_worker_loads_a_model_once(tmp_path: Path, resolver: ModelResolver) -> None:
    context = UnitContext(tmp_path)
    embedding = open_it(make_embedder(tmp_path / "e"), "embedding", resolver)
    other = embedding.model_copy(update={"prompts": Prompts(query="q ")})

    assert open_embedder(embedding, context) is open_embedder(embedding, context)
    assert open_embedder(other, context).retriever == other
    reranker = open_it(make_reranker(tmp_path / "r"), "reranker", resolver)
    assert open_reranker(reranker, context) is open_reranker(reranker, context)


def test_half_precision_is_close(tmp_path: Path, resolver: ModelResolver) -> None:
    retriever = open_it(make_embedder(tmp_path / "e"), "embedding", resolver)
    exact = Embedder(retriever, "cpu").embed(TEXTS)
    half = Embedder(retriever, "cpu", torch.bfloat16).embed(TEXTS)

    assert half.dtype == np.float32
    np.testing.assert_allclose(half, exact, atol=0.02)
    scores = load_cross_encoder(
        open_it(make_reranker(tmp_path / "r"), "reranker", resolver), "cpu", torch.bfloat16
    )
    assert next(scores.parameters()).dtype is torch.bfloat16
