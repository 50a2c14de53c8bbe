"""The arithmetic of the numpy engine, on rows.

Invariant: each row of a result depends bitwise on the same row of the arguments alone, however many rows there are.
Products are therefore one matrix-vector call of one fixed shape per row (`np.matmul` over a stack of columns makes
exactly those calls), never a matrix-matrix call, whose kernels and summation order change with the number of rows.
Threads of the BLAS do not matter: they split a fixed shape in a fixed way. Element-wise functions and sums along the
last axis have one order per row. `rows_are_independent` checks the claim against the BLAS that is loaded.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared.engine.interface import Float32

Intp = npt.NDArray[np.intp]


def linear(weight: Float32, x: Float32) -> Float32:
    """x @ weight.T, one matrix-vector product per row: weight [m, k], x [n, k] C-contiguous -> [n, m]."""
    product: Float32 = np.matmul(weight, x[:, :, None])
    return product[:, :, 0]


def rows_are_independent(weight: Float32) -> bool:
    """Whether `linear` with this matrix gives a row the same bits alone, in a batch, and at other addresses.

    weight: [m, k]; any values, since shapes alone choose a kernel.
    """
    m, k = weight.shape
    # No random numbers needed: values of many magnitudes and both signs, so that every order of summation differs.
    x: Float32 = np.sin(np.arange(1.0, 3 * k + 1) ** 1.5).reshape(3, k).astype(np.float32)
    together = linear(weight, x)
    for row in range(3):
        moved = np.empty(k + row + 1, np.float32)[row + 1 :]
        moved[:] = x[row]
        if not np.array_equal(linear(weight, moved[None]).view(np.int32), together[row : row + 1].view(np.int32)):
            return False
    return together.shape == (3, m)


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """x / sqrt(mean(x * x) + eps) * weight along the last axis: x [..., k], weight [k] -> [..., k]."""
    mean: Float32 = np.add.reduce(x * x, axis=-1, keepdims=True)
    mean /= np.float32(x.shape[-1])
    mean += np.float32(eps)
    out: Float32 = np.divide(x, np.sqrt(mean, out=mean))
    out *= weight
    return out


def silu_product(gate_up: Float32) -> Float32:
    """silu(gate) * up: gate_up [n, 2 f], gate first -> [n, f]."""
    half = gate_up.shape[1] // 2
    gate = gate_up[:, :half]
    out: Float32 = np.negative(gate)
    # exp overflows to infinity for gates under -88, where silu is zero.
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += np.float32(1)
    np.divide(gate, out, out=out)
    out *= gate_up[:, half:]
    return out


def select_experts(scores: Float32, k: int, normalize: bool, scale: float) -> tuple[Intp, Float32]:
    """Softmax over all experts, then the k largest (of equal ones the lower id first).

    Args:
        scores: [n, n_expert] products with the expert selection matrix.
        normalize: divide the chosen weights by their sum.
        scale: multiplies the weights.

    Returns:
        ids [n, k] and weights [n, k], by descending score.
    """
    exps = np.exp(scores - scores.max(axis=1, keepdims=True))
    probs = exps / np.add.reduce(exps, axis=1, keepdims=True)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    weights: Float32 = np.take_along_axis(probs, ids, axis=1)
    if normalize:
        weights /= np.add.reduce(weights, axis=1, keepdims=True)
    if scale != 1.0:
        weights *= np.float32(scale)
    return ids, weights


def expert_ffn(x: Float32, gate_up: Float32, down: Float32, ids: Intp, weights: Float32) -> Float32:
    """The weighted sum of each row's experts, added in the order of `ids`.

    Each expert's matrices are read once for all the rows that chose it.

    Args:
        x: [n, n_embd].
        gate_up: [n_expert, 2 n_ff, n_embd], gate first. down: [n_expert, n_embd, n_ff].
        ids, weights: [n, k], of `select_experts`.

    Returns:
        [n, n_embd].
    """
    n, k = ids.shape
    chosen = ids.reshape(-1)
    parts = np.empty((n * k, x.shape[1]), np.float32)
    for expert in np.unique(chosen):
        where = np.flatnonzero(chosen == expert)
        parts[where] = linear(down[expert], silu_product(linear(gate_up[expert], x[where // k])))
    parts3 = parts.reshape(n, k, -1)
    parts3 *= weights[:, :, None]
    out: Float32 = parts3[:, 0].copy()
    for slot in range(1, k):
        out += parts3[:, slot]
    return out


def rotate_neox(x: Float32, cos: Float32, sin: Float32) -> Float32:
    """Rotate elements i and i + d by angle i: x [n, heads, head_dim], cos and sin [n, 1, d], 2 d <= head_dim."""
    d = cos.shape[-1]
    out: Float32 = x.copy()
    a, b = x[..., :d], x[..., d : 2 * d]
    out[..., :d] = a * cos - b * sin
    out[..., d : 2 * d] = b * cos + a * sin
    return out


def rotate_norm(x: Float32, cos: Float32, sin: Float32) -> Float32:
    """Rotate elements 2 i and 2 i + 1 by angle i; shapes as in `rotate_neox`."""
    d = cos.shape[-1]
    out: Float32 = x.copy()
    a, b = x[..., 0 : 2 * d : 2], x[..., 1 : 2 * d : 2]
    out[..., 0 : 2 * d : 2] = a * cos - b * sin
    out[..., 1 : 2 * d : 2] = b * cos + a * sin
    return out


def attend(q: Float32, keys: Float32, values: Float32, scale: float, out: Float32) -> None:
    """Softmax attention of one row over its whole prefix, itself included; shapes depend on its position alone.

    Args:
        q: [n_head_kv, group, head_dim]: the query heads that share a key-value head.
        keys: [n_head_kv, position + 1, head_dim]. values: [n_head_kv, position + 1, value_dim].
        scale: of the scores.
        out: [n_head_kv, group, value_dim], written.
    """
    scores: Float32 = np.matmul(q, keys.transpose(0, 2, 1))
    scores *= np.float32(scale)
    scores -= np.maximum.reduce(scores, axis=2, keepdims=True)
    np.exp(scores, out=scores)
    total = np.add.reduce(scores, axis=2, keepdims=True)
    np.matmul(scores, values, out=out)
    out /= total
