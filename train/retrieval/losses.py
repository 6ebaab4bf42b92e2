"""The losses of embedding models and rerankers: those of sentence-transformers, with the settings of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from sentence_transformers.cross_encoder import losses as reranking
from sentence_transformers.sentence_transformer import losses as embedding
from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric
from sentence_transformers.util import pairwise_cos_sim

from aidocks.training.retriever import EmbeddingTraining, RerankerLoss, RerankerTraining

#: Pairs of query and passage that a reranker reads in one forward pass.
_PAIRS = 32


def embedding_loss(training: EmbeddingTraining, model: Any, processes: int) -> torch.nn.Module:
    """Return the loss of an embedding model.

    ``mnrl``: InfoNCE over the cosines with all passages of the step (van den Oord et al. 2018); ``cached_mnrl``: the
    same in parts (GradCache, Gao et al. 2021); ``cosent``: Su 2022; ``angle``: Li and Li 2023; ``margin_mse``:
    Hofstätter et al. 2020; Matryoshka: Kusupati et al. 2022. With several processes the gathered loss of each is the
    mean over its own queries, and its gradient goes back to whose passages they are, so the mean of the processes'
    gradients, which DDP takes, is that of the whole step.

    Args:
        training: What is trained.
        model: The SentenceTransformer.
        processes: How many train together.
    """
    hyper = training.hyper

    def similar(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Cosines as steep as those of the contrastive losses: a teacher's logits spread wider than from -1 to 1."""
        return pairwise_cos_sim(first, second) / hyper.temperature

    in_batch = {
        "scale": 1 / hyper.temperature,
        "gather_across_devices": processes > 1 and hyper.gather_negatives,
    }
    makers: Mapping[str, Callable[[], torch.nn.Module]] = {
        "mnrl": lambda: embedding.MultipleNegativesRankingLoss(model, **in_batch),
        "cached_mnrl": lambda: embedding.CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=hyper.chunk, **in_batch
        ),
        "triplet": lambda: embedding.TripletLoss(
            model, distance_metric=TripletDistanceMetric.COSINE, triplet_margin=hyper.margin
        ),
        "cosent": lambda: embedding.CoSENTLoss(model),
        "angle": lambda: embedding.AnglELoss(model),
        "cosine": lambda: embedding.CosineSimilarityLoss(model),
        "margin_mse": lambda: embedding.MarginMSELoss(model, similarity_fct=similar),
        "distill_kl": lambda: embedding.DistillKLDivLoss(model, similarity_fct=similar),
    }
    loss = makers[training.loss]()
    if not hyper.matryoshka:
        return loss
    whole = model.get_embedding_dimension()
    dimensions = sorted({*hyper.matryoshka, whole}, reverse=True)
    return embedding.MatryoshkaLoss(model, loss, matryoshka_dims=dimensions)


def reranker_loss(training: RerankerTraining, model: Any) -> torch.nn.Module:
    """Return the loss of a reranker.

    ``lambda``: LambdaLoss with the weights of NDCG-Loss2++ (Wang et al. 2018); ``ranknet``: Burges et al. 2005;
    ``listnet``: Cao et al. 2007; ``listmle``: Xia et al. 2008; ``plistmle``: Lan et al. 2014.

    Args:
        training: What is trained.
        model: The CrossEncoder, of one label.
    """
    listwise: dict[RerankerLoss, Any] = {
        "lambda": reranking.LambdaLoss,
        "ranknet": reranking.RankNetLoss,
        "listnet": reranking.ListNetLoss,
        "listmle": reranking.ListMLELoss,
        "plistmle": reranking.PListMLELoss,
    }
    if training.loss in listwise:
        loss: torch.nn.Module = listwise[training.loss](model, mini_batch_size=_PAIRS)
        return loss
    other: dict[RerankerLoss, Callable[[], torch.nn.Module]] = {
        "bce": lambda: reranking.BinaryCrossEntropyLoss(model),
        "mnrl": lambda: reranking.MultipleNegativesRankingLoss(model),
        "margin_mse": lambda: reranking.MarginMSELoss(model),
        "mse": lambda: reranking.MSELoss(model),
    }
    return other[training.loss]()
