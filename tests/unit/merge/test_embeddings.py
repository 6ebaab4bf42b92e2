"""Embeddings whose rows move, against a computation token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.writer import ShardPlan, ShardWriter, TensorPlan
from aidocks.errors import IncompatibleModels
from aidocks.merge.embeddings import mapped_rows
from aidocks.merge.rows import MemoryRows
from aidocks.merge.token_rows import AUTOMATIC, ZERO


def mapping(
    directory: Path,
    rows: list[list[int]],
    *,
    size: int | None = None,
    base: int = AUTOMATIC,
    source: list[int] | None = None,
    source_row: list[int] | None = None,
    force: list[int] | None = None,
    is_token: list[int] | None = None,
) -> OutputFile:
    """Write a mapping as :class:`aidocks.merge.vocabulary.WriteVocabulary` does."""
    count = len(rows[0])
    arrays = {
        "facts": [size or count, base],
        "rows": rows,
        "is_token": is_token or [1] * count,
        "source": source or [AUTOMATIC] * count,
        "source_row": source_row or [0] * count,
        "force": force or [0] * count,
    }
    stored = {name: np.array(value, dtype="<i4") for name, value in arrays.items()}
    plans = tuple(TensorPlan(name=n, dtype="I32", shape=a.shape) for n, a in stored.items())
    with ShardWriter(directory, ShardPlan(file_name="vocabulary.safetensors", tensors=plans)) as writer:
        for name, array in stored.items():
            writer.copy_ranges(name, [array.tobytes()])
    return writer.output


def tables(*counts: int, columns: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, columns, generator=generator).to(dtype) for count in counts]


def in_memory(values: list[torch.Tensor]) -> list[MemoryRows]:
    return [MemoryRows(f"embedding {number}", value) for number, value in enumerate(values)]


def expected(values: list[torch.Tensor], rows: list[list[int]], base: int, size: int) -> list[torch.Tensor]:
    """Return every operand by the rules, one token at a time."""
    found = []
    for own in rows:
        made = torch.zeros(size, values[0].shape[1], dtype=torch.float64)
        for token, row in enumerate(own):
            having = [place for place in range(len(values)) if rows[place][token] >= 0]
            if row >= 0:
                made[token] = values[rows.index(own)][row]
            elif base in having:
                made[token] = values[base][rows[base][token]]
            elif having:
                made[token] = sum(values[place][rows[place][token]].double() for place in having) / len(
                    having
                )
        made[len(own) :] = made[: len(own)].mean(0)
        found.append(made)
    return found


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_row_is_the_one_that_the_rules_say(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    operands = data.draw(st.integers(1, 4))
    tokens = data.draw(st.integers(1, 30))
    counts = [data.draw(st.integers(1, 40)) for _ in range(operands)]
    # A column of its own, so that no two operands have the same list.
    rows = [[data.draw(st.integers(-1, count - 1)) for _ in range(tokens)] + [0] for count in counts]
    for place, own in enumerate(rows):
        own.extend(0 if other == place else -1 for other in range(operands))
    base = data.draw(st.integers(-1, operands - 1))
    size = len(rows[0]) + data.draw(st.integers(0, 5))
    values = tables(*counts)
    file = mapping(tmp_path_factory.mktemp("m"), rows, base=base, size=size)
    for got, wanted in zip(
        mapped_rows(in_memory(values), file), expected(values, rows, base, size), strict=True
    ):
        assert got.shape == (size, 3)
        begin = data.draw(st.integers(0, size))
        end = data.draw(st.integers(begin, size))
        assert torch.allclose(got.read(begin, end).double(), wanted[begin:end], atol=1e-6)
        assert torch.allclose(got.read(0, size).double(), wanted, atol=1e-6)


def test_rows_of_one_model_keep_their_values_bit_by_bit(tmp_path: Path) -> None:
    values = tables(500, 500, dtype=torch.bfloat16)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1)).tolist()
    (moved, stays) = mapped_rows(in_memory(values), mapping(tmp_path, [order, list(range(500))]))
    assert torch.equal(moved.read(0, 500), values[0][order].float())
    assert torch.equal(stays.read(123, 200), values[1][123:200].float())


def test_what_a_request_says_of_tokens(tmp_path: Path) -> None:
    values = tables(4, 4)
    file = mapping(
        tmp_path,
        [[0, 1, 2, -1], [0, -1, 2, -1]],
        base=0,
        source=[1, ZERO, 0, 1],
        source_row=[3, 0, 1, 2],
        force=[1, 0, 0, 0],
    )
    first, second = (rows.read(0, 4) for rows in mapped_rows(in_memory(values), file))
    # Forced: for both. Not forced: only where there is no row of one's own.
    assert torch.equal(first, torch.stack([values[1][3], values[0][1], values[0][2], values[1][2]]))
    assert torch.equal(second, torch.stack([values[1][3], torch.zeros(3), values[1][2], values[1][2]]))


def test_only_the_operands_count(tmp_path: Path) -> None:
    values = tables(3, 3, 3)
    file = mapping(tmp_path, [[-1, 0], [0, 1], [1, 2]], base=0, source=[AUTOMATIC, 2], source_row=[0, 0])
    (alone,) = mapped_rows(in_memory(values[:1]), file, [0])
    assert torch.equal(alone.read(0, 2), torch.stack([torch.zeros(3), values[0][0]]))
    one, _ = mapped_rows(in_memory([values[0], values[2]]), file, [0, 2])
    assert torch.equal(one.read(0, 1)[0], values[2][1])
    needed = mapping(tmp_path, [[-1], [0], [1]], source=[2])
    with pytest.raises(IncompatibleModels, match="Row 0 of embedding 0 is to come from a model"):
        mapped_rows(in_memory(values[:2]), needed, [0, 1])


def test_numbers_without_a_token_are_padding(tmp_path: Path) -> None:
    (value,) = tables(4)
    file = mapping(tmp_path, [[0, 1, -1, 3]], is_token=[1, 1, 0, 1], size=6)
    (rows,) = mapped_rows(in_memory([value]), file)
    mean = value[[0, 1, 3]].mean(0)
    assert torch.allclose(rows.read(2, 3)[0], mean)
    assert torch.allclose(rows.read(4, 6), mean.expand(2, -1))
    assert torch.equal(rows.read(3, 4)[0], value[3])


def test_a_bias_has_one_value_a_token(tmp_path: Path) -> None:
    biases = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0])]
    file = mapping(tmp_path, [[2, 1, 0, -1], [0, -1, -1, 1]], size=5)
    first, second = mapped_rows(in_memory(biases), file)
    assert first.shape == (5,)
    assert first.read(0, 1).tolist() == [[3.0, 2.0, 1.0, 20.0, 6.5]]
    assert second.read(0, 1).tolist() == [[10.0, 2.0, 1.0, 20.0, 8.25]]


def test_a_bias_of_the_head_is_read_once(tmp_path: Path) -> None:
    class Counted(MemoryRows):
        def read(self, begin: int, end: int) -> torch.Tensor:
            readings.append((begin, end))
            return super().read(begin, end)

    readings: list[tuple[int, int]] = []
    order = np.random.default_rng(0).permutation(100).tolist()
    bias = torch.randn(100)
    (mapped,) = mapped_rows([Counted("bias", bias)], mapping(tmp_path, [order]))
    for _ in range(2):
        assert torch.equal(mapped.read(0, 1)[0], bias[order])
    assert readings == [(0, 1)]
