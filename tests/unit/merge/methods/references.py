"""Merge methods in NumPy, written from the papers' formulas on whole arrays in float64: slow, and easy to read.

d_NX are differences from the base, [N, ...]; weights and densities are for each model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def linear(x_NX: Array, weight: Array, normalize: bool) -> Array:
    total = np.tensordot(weight, x_NX, 1)
    return total / weight.sum() if normalize else total


def slerp(a: Array, b: Array, t: float) -> Array:
    """Shoemake 1985; a straight line where the two are (nearly) parallel."""
    cos = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    if abs(cos) > 0.9995:
        return (1 - t) * a + t * b
    theta = np.arccos(cos)
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def slerp_rows(a: Array, b: Array, t: float, axis: int) -> Array:
    """Each vector along an axis on its own; always on the arc."""
    a, b = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
    out = np.empty_like(a)
    for place in np.ndindex(a.shape[:-1]):
        u, v = a[place], b[place]
        theta = np.arccos(np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1, 1))
        straight = np.sin(theta) ** 2 <= 1e-16
        out[place] = (
            (1 - t) * u + t * v
            if straight
            else (np.sin((1 - t) * theta) * u + np.sin(t * theta) * v) / np.sin(theta)
        )
    return np.moveaxis(out, -1, axis)


def multislerp(x_NX: Array, weight: Array) -> Array:
    """Mean direction times mean norm. By way of the tangent space, as published."""
    flat, w = x_NX.reshape(len(x_NX), -1), weight / weight.sum()
    norms = np.linalg.norm(flat, axis=1)
    units = flat / norms[:, None]
    mean = w @ units / np.linalg.norm(w @ units)
    tangent = w @ (units - (units @ mean)[:, None] * mean)
    angle = np.linalg.norm(tangent)
    point = np.cos(angle) * mean + (np.sin(angle) / angle * tangent if angle > 1e-12 else 0)
    return (point * (w @ norms)).reshape(x_NX.shape[1:])


def karcher(x_NX: Array, iterations: int = 10) -> Array:
    """Gradient descent on the sphere towards the least sum of squared angles."""
    flat = x_NX.reshape(len(x_NX), -1)
    norms = np.linalg.norm(flat, axis=1)
    units = flat / norms[:, None]
    mean = units.mean(0) / np.linalg.norm(units.mean(0))
    for _ in range(iterations):
        cos = np.clip(units @ mean, -1, 1)
        theta = np.arccos(cos)
        pulls = [
            t / np.sin(t) * (u - c * mean) for u, c, t in zip(units, cos, theta, strict=True) if t >= 1e-5
        ]
        step = np.sum(pulls, axis=0) / len(units) if pulls else np.zeros_like(mean)
        size = np.linalg.norm(step)
        if size < 1e-5:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
        mean /= np.linalg.norm(mean)
    return (norms.mean() * mean).reshape(x_NX.shape[1:])


def model_stock(base: Array, d_NX: Array) -> Array:
    """arXiv 2403.19522, equation 5: w = t w_avg + (1 - t) w_0, t = N cos / (1 + (N - 1) cos)."""
    flat, n = d_NX.reshape(len(d_NX), -1), len(d_NX)
    cosines = [
        flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j])
        for i in range(n)
        for j in range(i)
    ]
    cos = float(np.mean(cosines))
    t = n * cos / (1 + (n - 1) * cos)
    return t * (base + d_NX.mean(0)) + (1 - t) * base


def trim(d: Array, density: float) -> Array:
    """arXiv 2306.01708, section 4.1: the largest magnitudes; of equal ones the first."""
    kept = np.argsort(-np.abs(d), axis=None, kind="stable")[: max(1, int(density * d.size)) if density else 0]
    mask = np.zeros(d.size, dtype=bool)
    mask[kept] = True
    return np.where(mask.reshape(d.shape), d, 0)


def mask_outliers(d: Array, density: float, gamma: float) -> Array:
    """arXiv 2312.06795, section 3: neither the largest nor the smallest."""
    kept = int(density * d.size)
    below = max(0, d.size - kept - int(gamma * d.size))
    order = np.argsort(np.abs(d), axis=None, kind="stable")[below : below + kept]
    mask = np.zeros(d.size, dtype=bool)
    mask[order] = True
    return np.where(mask.reshape(d.shape), d, 0)


def keep_l1(d: Array, thinned: Array) -> Array:
    kept = np.abs(thinned).sum()
    return thinned * (np.abs(d).sum() / kept) if kept else thinned


def elect_and_merge(d_NX: Array, weight: Array, normalize: bool) -> Array:
    """arXiv 2306.01708, section 4.1: elect the sign of the sum, merge what agrees."""
    w_NX = weight.reshape(-1, *[1] * (d_NX.ndim - 1))
    weighted = w_NX * d_NX
    sign = np.where(weighted.sum(0) >= 0, 1, -1)
    agrees = np.sign(weighted) == sign
    merged = (weighted * agrees).sum(0)
    weights = (w_NX * agrees).sum(0)
    return merged / np.where(weights == 0, 1, weights) if normalize else merged


def sce(d_NX: Array, top: float) -> Array:
    """arXiv 2408.07990, section 3.3: select, calculate, erase."""
    variance = d_NX.var(0)
    if top < 1:
        count = int(np.count_nonzero(variance) * top)
        mask = np.zeros(variance.size, dtype=bool)
        mask[np.argsort(-variance, axis=None, kind="stable")[:count]] = True
        d_NX = d_NX * mask.reshape(variance.shape)
    squares = np.square(d_NX).reshape(len(d_NX), -1).mean(1)
    weight = squares / squares.sum() if squares.sum() >= 1e-6 else np.full(len(d_NX), 1 / len(d_NX))
    return elect_unweighted(d_NX, weight)


def elect_unweighted(d_NX: Array, weight: Array) -> Array:
    w_NX = weight.reshape(-1, *[1] * (d_NX.ndim - 1))
    agrees = np.sign(d_NX) == np.where(d_NX.sum(0) >= 0, 1, -1)
    return (w_NX * d_NX * agrees).sum(0) / np.maximum((w_NX * agrees).sum(0), 1e-6)


def ram(d_NX: Array, epsilon: float, factors: Array) -> Array:
    """What one model alone changes whole, what several change averaged."""
    changed = np.abs(d_NX) > epsilon
    number = changed.sum(0)
    factor = np.where(number == 1, factors.reshape(-1, *[1] * (d_NX.ndim - 1)), 1)
    return (d_NX * changed * factor).sum(0) / np.maximum(number, 1)


def importance_mask(base: Array, other: Array) -> NDArray[np.bool_]:
    """|difference| times each row's divergence, at least median + 1.5 interquartile ranges."""

    def softmax(x: Array) -> Array:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) + 1e-8

    p, q = softmax(other), softmax(base)
    importance = np.abs(other - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ranked = np.sort(importance, axis=None)
    low, middle, high = (ranked[int(share * (ranked.size - 1))] for share in (0.25, 0.5, 0.75))
    return importance >= middle + 1.5 * (high - low)
