"""Lists of the matrices with the highest signal-to-noise ratio, for training that leaves the others frozen.

The idea is that of Spectrum (E. Hartford, L. Atkins, F. Fernandes Neto and D. Golchinfar, arXiv 2406.06623): of each
kind of matrix the top share is trained, in full precision, and all else is frozen. It orders by the original ratio over
the largest singular value, which has the unit of one over a weight: scaling a matrix changes it. The corrected ratio
stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from aidocks.laser.matrices import Matrix, parse_address
from aidocks.specs.laser_scan import LayerList, ScannedMatrix, Score

SCORES: tuple[Score, ...] = ("noise_ratio", "original")
#: Matrices in one picture, at most: of more, that many evenly spaced ones are shown.
_MOST_PICTURED = 128


def score_of(matrix: ScannedMatrix, score: Score) -> float:
    """Return what a matrix is ordered by; infinite where nothing of it is noise."""
    if score == "noise_ratio":
        return math.inf if matrix.noise_ratio is None else matrix.noise_ratio
    if matrix.snr is None:
        return math.inf
    return matrix.snr / matrix.spectral_norm if matrix.spectral_norm > 0 else 0.0


def module_kind(address: str) -> str:
    """Return what a matrix is within its layer: ``self_attn.q_proj``, ``mlp.experts.*.w1``.

    More than the last name, since ``c_proj`` of GPT-2 is one matrix of the attention and another of the MLP.
    """
    parts = _module(address).split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join("*" if part.isdecimal() else part for part in parts[first + 1 :])


def _module(address: str) -> str:
    return parse_address(address)[0].removesuffix(".weight")


def group_by_kind(matrices: Iterable[ScannedMatrix]) -> dict[str, list[ScannedMatrix]]:
    """Return the matrices of numbered layers by :func:`module_kind`, kinds in alphabetical order."""
    groups: dict[str, list[ScannedMatrix]] = {}
    for matrix in matrices:
        if matrix.layer is not None:
            groups.setdefault(module_kind(matrix.address), []).append(matrix)
    return dict(sorted(groups.items()))


def pictures_by_kind(matrices: Iterable[Matrix]) -> dict[str, tuple[Matrix, ...]]:
    """Return what each picture of small multiples shows: file name -> matrices of one kind, by layer.

    A kind is that of the lists (:func:`module_kind`); what belongs to no layer is one kind. Of more matrices
    than a picture has room for there are as many as it has, evenly spaced.
    """
    found: dict[str, list[Matrix]] = {}
    for matrix in sorted(matrices, key=lambda matrix: matrix.order):
        kind = "no-layer" if matrix.layer is None else module_kind(matrix.address).replace("*", "N")
        found.setdefault(re.sub(r"[^\w.-]", "_", kind), []).append(matrix)
    return {f"spectra-{kind}.png": tuple(_spaced(members)) for kind, members in sorted(found.items())}


def _spaced(members: Sequence[Matrix]) -> Sequence[Matrix]:
    if len(members) <= _MOST_PICTURED:
        return members
    return [members[round(i * (len(members) - 1) / (_MOST_PICTURED - 1))] for i in range(_MOST_PICTURED)]


def list_layers(
    matrices: Sequence[ScannedMatrix], top_fraction: float, score: Score, embeddings: bool
) -> LayerList:
    """Return the top share of each kind, rounded down, as Spectrum does.

    Args:
        matrices: Of the whole scan.
        top_fraction: Share of each kind.
        score: What they are ordered by.
        embeddings: Whether to name what belongs to no layer, too.
    """
    chosen: list[str] = []
    for members in group_by_kind(matrices).values():
        ordered = sorted(members, key=lambda matrix: (-score_of(matrix, score), matrix.layer, matrix.address))
        count = math.floor(top_fraction * len(ordered) + 1e-9)
        chosen += (matrix.address for matrix in ordered[:count])
    outside = [name for m in matrices if m.layer is None for name in (m.address, *m.tied)]
    suffix = "" if score == "noise_ratio" else "-original"
    return LayerList(
        top_fraction=top_fraction,
        score=score,
        file=f"unfrozen-{100 * top_fraction:g}-percent{suffix}.yaml",
        addresses=tuple(chosen),
        also=tuple(outside) if embeddings else (),
    )


def unfrozen_yaml(layers: LayerList) -> str:
    """Return a list as the ``unfrozen_parameters`` of an axolotl configuration.

    They are regular expressions in which axolotl takes every dot for a dot (so none is escaped), and which may end
    with a range of rows; the first axis of a tensor of experts counts the experts.
    """
    lines = ["unfrozen_parameters:"]
    lines += [f"- {pattern(address)}" for address in layers.also]
    for kind, addresses in groupby(layers.addresses, module_kind):
        lines.append(f"# {kind}")
        lines += [f"- {pattern(address)}" for address in addresses]
    if len(lines) == 1:
        return "unfrozen_parameters: []\n"
    return "\n".join(lines) + "\n"


def pattern(address: str) -> str:
    """Return axolotl's pattern of exactly one matrix."""
    name, expert = parse_address(address)
    return f"^{name}$" if expert is None else f"^{name}$[{expert}:{expert + 1}]"


def spectrum_table(matrices: Iterable[ScannedMatrix]) -> Mapping[str, Any]:
    """Return the corrected ratios as Spectrum writes its own: module -> type and ``snr``.

    A file of that form, called ``snr_results_<model>.json``, is what its readers (axolotl's plugin) look for. The
    experts of one tensor are one entry, with their mean.
    """
    found: dict[str, list[tuple[str, float]]] = {}
    finite = [s for m in matrices if math.isfinite(s := score_of(m, "noise_ratio"))]
    highest = max(finite, default=0.0)
    for kind, members in group_by_kind(matrices).items():
        for matrix in members:
            # JSON has no infinity; what holds no noise at all comes first all the same.
            score = min(score_of(matrix, "noise_ratio"), 2 * highest + 1)
            found.setdefault(_module(matrix.address), []).append((kind, score))
    return {
        module: {"snr": sum(score for _, score in scores) / len(scores), "type": scores[0][0]}
        for module, scores in found.items()
    }
