"""``/laser/scan``: the spectrum of every weight matrix of a model, without loading it.

hash the weight files -> singular values of each matrix (kept by content) -> lists, pictures and tables below the cache
directory. The same bytes are scanned once: asked again, the files of the first time are the answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aidocks.checkpoints.files import OutputFile, write_bytes, write_text
from aidocks.checkpoints.header import TensorEntry
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.writer import ShardPlan, ShardWriter, TensorPlan
from aidocks.laser.batches import Device, look_at_device, run_in_batches
from aidocks.laser.layer_lists import (
    SCORES,
    list_layers,
    pictures_by_kind,
    spectrum_table,
    unfrozen_yaml,
)
from aidocks.laser.matrices import Matrix, find_matrices, select_matrices
from aidocks.laser.scan import MatrixSpectrum, ScanMatrices, ScanMatrix, open_checkpoint, scan_units
from aidocks.models.hub import fetch_missing
from aidocks.plan import Operation, Plan, PlanContext, Stage, Unit, UnitContext, WritingUnit, WrittenFiles
from aidocks.specs.base import OperationResult, Spec
from aidocks.specs.laser_scan import LaserScanResult, LaserScanSpec, RuleOutcome, ScannedMatrix

#: Raise it when the same weights and request get other files.
_VERSION = 2
_SCAN_FILE, _VALUES_FILE = "scan.json", "spectra.safetensors"
_CHUNK_BYTES = 4 << 20


class LaserScan(Operation[LaserScanSpec, LaserScanResult]):
    """See the top of this module."""

    spec_type: ClassVar[type[Spec]] = LaserScanSpec
    result_type: ClassVar[type[OperationResult]] = LaserScanResult

    def inputs(self, spec: LaserScanSpec) -> dict[str, str]:
        return {"model": spec.model}

    def preflight(self, spec: LaserScanSpec, context: PlanContext) -> None:
        if not context.resolver.needs_download(spec.model, field="model"):
            _choose(context.resolver.open(spec.model, field="model"), spec)

    def plan(self, spec: LaserScanSpec, context: PlanContext) -> Plan[LaserScanResult]:
        yield from fetch_missing({"model": spec.model}, context)
        checkpoint = context.resolver.open(spec.model, field="model")
        matrices = _choose(checkpoint, spec)
        hashing = HashWeights(
            checkpoint=checkpoint.path, cache_dir=context.cache_dir, alike=_alike(checkpoint, matrices)
        )
        (hashes,) = yield Stage("hash", (hashing,))
        directory = context.cache_dir / "scans" / _content_hash(hashes.files, spec)
        result = _read(directory)
        if result is None:
            distinct = tuple(m for m in matrices if m.name not in hashes.same)
            device = yield from look_at_device()
            spectra = yield from scan(
                checkpoint, distinct, hashes.files, spec.keep, context.cache_dir, device
            )
            result = yield from _write(spectra, hashes, spec, context, checkpoint, directory)
        else:
            context.say("These weights were scanned before with the same request.")
        # An answer stays compact: values are in the files.
        rows = (row.model_copy(update={"singular_values": ()}) for row in result.matrices[: spec.rows])
        return result.model_copy(update={"matrices": tuple(rows)})


def scan(
    checkpoint: Checkpoint,
    matrices: Sequence[Matrix],
    file_hashes: dict[str, str],
    keeps: tuple[float, ...],
    cache_dir: Path,
    device: Device,
) -> Generator[Stage, list[Any], tuple[MatrixSpectrum, ...]]:
    """Yield the stage that scans these matrices and return their spectra, by layer and name.

    Args:
        checkpoint: The model.
        matrices: Some of it.
        file_hashes: SHA-256 of the weight files by name, see :class:`HashWeights`.
        keeps: See :class:`ScanMatrix`.
        cache_dir: Where singular values are kept.
        device: Of the workers.
    """
    units = scan_units(checkpoint, matrices, file_hashes, cache_dir, keeps)
    # Longest first, so that no worker is left with a long one at the end.
    ordered = sorted(units, key=lambda unit: (-unit.weight, unit.matrix.order))
    spectra = yield from run_in_batches("scan", ordered, device, lambda group: ScanMatrices(units=group))
    return tuple(sorted(spectra, key=lambda spectrum: spectrum.matrix.order))


class WeightHashes(BaseModel):
    """What the bytes of a checkpoint's weights are.

    Attributes:
        files: SHA-256 by file name.
        same: Tensor -> another of the same bytes, which stands for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, str]
    same: dict[str, str] = Field(default_factory=dict)


class HashWeights(Unit[WeightHashes]):
    """Hashes of all weight files (read unless they are known), and which tensors are stored twice."""

    result_type: ClassVar[type[BaseModel]] = WeightHashes

    checkpoint: Path = Field(description="Checkpoint directory.")
    cache_dir: Path = Field(description="Where hashes of large files are kept.")
    alike: tuple[tuple[str, ...], ...] = Field(
        (),
        description="Tensors of equal shape and type that may hold the same bytes; the first stands for the others.",
    )

    @property
    def label(self) -> str:
        return f"hash of {self.checkpoint.name}"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> WeightHashes:
        from aidocks.checkpoints.hashes import FileHashes

        checkpoint = open_checkpoint(self.checkpoint, context)
        same = {
            name: first
            for first, *others in self.alike
            for name in others
            if _same_bytes(checkpoint.entries[first], checkpoint.entries[name])
        }
        return WeightHashes(files=FileHashes(self.cache_dir).compute(checkpoint.weight_files), same=same)


class DrawSpectra(WritingUnit):
    """The picture of all spectra of one kind."""

    file: Path = Field(description="Where it is written.")
    pictured: tuple[ScanMatrix, ...] = Field(description="Scans of the matrices that it shows.")

    @property
    def label(self) -> str:
        return self.file.name

    @property
    def weight(self) -> float:
        return float(len(self.pictured))

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.laser.scan_figures import draw_kind

        spectra = ((unit.matrix, unit.values(context)) for unit in self.pictured)
        title = self.file.stem.removeprefix("spectra-")
        return WrittenFiles(files=(write_bytes(self.file, draw_kind(title, spectra, len(self.pictured))),))


class WriteScan(WritingUnit):
    """The files of a scan: tables, lists, values; ``scan.json`` is the last, so that where it is, all is."""

    directory: Path = Field(description="Where the files are written.")
    result: LaserScanResult = Field(description="As the job returns it, with all rows and values.")
    scans: tuple[ScanMatrix, ...] = Field(
        description="Of all matrices; their values are kept since they were scanned."
    )
    pictured: tuple[ScanMatrix, ...] = Field(description="Those whose spectrum the overview shows.")

    @property
    def label(self) -> str:
        return "tables, lists and pictures"

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.laser import scan_figures as figures

        rows, lists = self.result.matrices, self.result.lists
        spectra = [(unit.matrix, unit.values(context)) for unit in self.pictured]
        documents = {
            "snr_results.json": dict(spectrum_table(rows)),
            "layers.json": [layers.model_dump(mode="json") for layers in lists],
        }
        written: list[OutputFile] = [
            write_bytes(self.directory / "noise_ratio.png", figures.draw_noise_ratios(rows)),
            write_bytes(self.directory / "spectra.png", figures.draw_spectra(spectra)),
            self._write_values(context),
            *(write_text(self.directory / layers.file, unfrozen_yaml(layers)) for layers in lists),
            write_text(self.directory / "unfrozen.yaml", self.result.unfrozen_yaml),
            *(write_text(self.directory / n, json.dumps(d, indent=1) + "\n") for n, d in documents.items()),
            write_text(self.directory / _SCAN_FILE, self.result.model_dump_json(indent=1) + "\n"),
        ]
        return WrittenFiles(files=tuple(written))

    def _write_values(self, context: UnitContext) -> OutputFile:
        """Write all singular values of all matrices: address -> float64 [N]."""
        import torch

        plans = (
            TensorPlan(name=unit.matrix.address, dtype="F64", shape=(unit.matrix.full_rank,))
            for unit in self.scans
        )
        plan = ShardPlan(file_name=_VALUES_FILE, tensors=tuple(plans))
        with ShardWriter(self.directory, plan) as writer:
            for unit in self.scans:
                writer.write(unit.matrix.address, torch.from_numpy(unit.values(context)))
        return writer.output


#: Files beside the lists and the pictures of the kinds, in the order in which people look at them.
_FILES = (
    "unfrozen.yaml",
    "noise_ratio.png",
    "spectra.png",
    _SCAN_FILE,
    "layers.json",
    "snr_results.json",
    _VALUES_FILE,
)
#: Spectra that the overview shows, at most: one matrix of each kind.
_PICTURED = 6


def _choose(checkpoint: Checkpoint, spec: LaserScanSpec) -> tuple[Matrix, ...]:
    matrices = find_matrices(checkpoint.entries, all_weights=True)
    return select_matrices(matrices, spec.layers, spec.kinds, spec.model, field="model")


def _alike(checkpoint: Checkpoint, matrices: Sequence[Matrix]) -> tuple[tuple[str, ...], ...]:
    """Return the tensors outside of layers that could be tied: of one shape and type, an embedding first."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for matrix in matrices:
        if matrix.layer is None and matrix.expert is None:
            groups.setdefault((matrix.shape, matrix.dtype), []).append(matrix.name)
    ordered = [sorted(names, key=lambda name: ("embed" not in name, name)) for names in groups.values()]
    return tuple(tuple(names) for names in ordered if len(names) > 1)


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        left = one.nbytes
        while left > 0:
            count = min(left, _CHUNK_BYTES)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True


def _content_hash(files: dict[str, str], spec: LaserScanSpec) -> str:
    request = spec.model_dump(mode="json", exclude={"model", "rows"})
    facts = json.dumps([_VERSION, files, request], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


def _read(directory: Path) -> LaserScanResult | None:
    """Return the result of an earlier scan, with all rows; None where there is none, or one of another version."""
    try:
        result = LaserScanResult.model_validate_json((directory / _SCAN_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    complete = all((directory / name).is_file() for name in result.files)
    return result.model_copy(update={"path": str(directory)}) if complete else None


def _write(
    spectra: Sequence[MatrixSpectrum],
    hashes: WeightHashes,
    spec: LaserScanSpec,
    context: PlanContext,
    checkpoint: Checkpoint,
    directory: Path,
) -> Generator[Stage, list[Any], LaserScanResult]:
    rows = tuple(describe_row(spectrum, hashes.same) for spectrum in spectra)
    lists = tuple(
        list_layers(rows, fraction, score, spec.embeddings)
        for fraction in spec.top_fractions
        for score in SCORES
    )
    matrices = [spectrum.matrix for spectrum in spectra]
    pictures = pictures_by_kind(matrices)
    result = LaserScanResult(
        path=str(directory),
        content_hash=directory.name,
        matrices_scanned=len(rows),
        parameters=sum(row.shape[0] * row.shape[1] for row in rows),
        matrices=rows,
        lists=lists,
        unfrozen_yaml=unfrozen_yaml(lists[0]) if lists else "unfrozen_parameters: []\n",
        files=(*_FILES, *pictures, *(layers.file for layers in lists)),
    )

    def scans(chosen: Sequence[Matrix]) -> tuple[ScanMatrix, ...]:
        return scan_units(checkpoint, chosen, hashes.files, context.cache_dir)

    drawings = tuple(
        DrawSpectra(file=directory / name, pictured=scans(chosen)) for name, chosen in pictures.items()
    )
    yield Stage("pictures", drawings)
    kinds = {matrix.kind: matrix for matrix in reversed(matrices)}
    overview = sorted(kinds.values(), key=lambda matrix: matrix.order)[:_PICTURED]
    writing = WriteScan(directory=directory, result=result, scans=scans(matrices), pictured=scans(overview))
    yield Stage("report", (writing,))
    return result


def describe_row(spectrum: MatrixSpectrum, same: dict[str, str]) -> ScannedMatrix:
    """Return the row of one matrix.

    Args:
        spectrum: Of the matrix.
        same: Tensor -> the one that stands for it.
    """
    matrix = spectrum.matrix
    return ScannedMatrix(
        address=matrix.address,
        layer=matrix.layer,
        kind=matrix.kind,
        shape=matrix.shape,
        sigma=spectrum.sigma,
        outliers=spectrum.outliers,
        edge=spectrum.edge,
        rules=tuple(
            RuleOutcome(rule=key, rank=decision.rank, energy=round(decision.energy, 6))
            for key, decision in spectrum.decisions.items()
        ),
        noise_ratio=spectrum.noise_ratio,
        snr=spectrum.snr,
        bulk_distance=spectrum.bulk_distance,
        frobenius=spectrum.frobenius,
        spectral_norm=spectrum.spectral_norm,
        # As many digits as anybody reads off a sample; the file of all values has them all.
        singular_values=tuple(float(f"{value:.6g}") for value in spectrum.singular_values),
        tied=tuple(name for name, first in same.items() if first == matrix.name),
    )
