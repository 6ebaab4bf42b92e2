"""Small files of examples that are large once they are unpacked: what is held of them does not grow with them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from aidocks.errors import InvalidSpec
from aidocks.training.data import reading
from aidocks.training.data.reading import read_rows, source_of_path

MIB = 1 << 20


def peak_of_reading(path: Path) -> int:
    """Return the most bytes that Python held while it read all rows, one by one."""
    source = source_of_path(str(path), (path.parent,))
    tracemalloc.start()
    try:
        for _ in read_rows(source):
            pass
    except InvalidSpec:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_a_value_that_is_that_of_every_row(tmp_path: Path) -> None:
    """A few hundred bytes of Parquet stand for a gigabyte; a few rows at a time are held."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    one = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * MIB]))
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": one}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 4000
    assert peak_of_reading(path) < 24 * MIB


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.txt", "rows.jsonl", "rows.json"])
def test_a_file_of_one_line(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_LONGEST_ROW", MIB)
    path = tmp_path / name
    path.write_bytes((b"[" if name.endswith("json") else b"a\n") + b'"' + b"x" * (32 * MIB))
    assert peak_of_reading(path) < 16 * MIB
