"""What mergekit 0.1.5 made of the same tensors, recorded: every method, on fp32 and on bf16 values.

``cases.json`` says how the tensors are drawn and which parameters were given, ``mergekit-0.1.5.npz`` what came out of
its ``merge_tensors`` in fp32, with PyTorch's sorts made stable (as installed they order equal magnitudes by the
processor's vector width, and so keep now these values and now those).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aidocks.merge.in_memory import merge_tensors
from aidocks.merge.method import known_methods

HERE = Path(__file__).parent
CASES: list[dict[str, Any]] = json.loads((HERE / "cases.json").read_text())


@cache
def recorded() -> dict[str, np.ndarray]:
    with np.load(HERE / "mergekit-0.1.5.npz") as results:
        return dict(results)


def drawn(case: dict[str, Any]) -> list[torch.Tensor]:
    random = np.random.RandomState(case["seed"])

    def normal() -> np.ndarray:
        return np.asarray(random.standard_normal(tuple(case["shape"]))).astype(np.float32)

    base = normal()
    arrays = [base] + [base + case["noise"] * normal() for _ in range(case["models"])]
    tensors = [torch.from_numpy(np.asarray(array, dtype=np.float32)) for array in arrays]
    if case["stored"] == "bfloat16":
        tensors = [tensor.bfloat16().float() for tensor in tensors]
    return tensors if case["base"] is not None else tensors[1:]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_same_as_recorded(case: dict[str, Any]) -> None:
    merged = merge_tensors(case["method"], drawn(case), case["base"], case["parameters"]).numpy()
    expected = recorded()[case["id"]]
    assert merged.shape == expected.shape
    assert np.abs(merged - expected).max() <= 1e-6 * np.abs(expected).max()


def test_every_method_is_recorded() -> None:
    ours = {
        name for name, method in known_methods().items() if method.function.__module__.startswith("aidocks.")
    }
    assert ours == {case["method"] for case in CASES}
