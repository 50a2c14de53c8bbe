"""The residual stream's kernels: sums of parts, RMS norms and 8-bit rows against NumPy, and bitwise row invariance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from shared.engine.numpy import ops
from shared.kernels.activations import Activations
from shared.kernels.device import Device
from shared.kernels.norm import add_norm, output_norm, quantize
from tests.kernels.arrays import Array, assert_same_bits, download, is_poison, poisoned, step_of, upload

EPS = 1e-6
SPARE = 2  # rows of the grid and of each buffer beyond those of the step


@dataclass(frozen=True)
class Inputs:
    """x [rows, k], parts [rows, n_parts, k], part_weights [rows, n_parts], norm_weight [k]."""

    x: Array
    parts: Array
    part_weights: Array
    norm_weight: Array

    @classmethod
    def random(cls, rows: int, k: int, n_parts: int = 3) -> Inputs:
        rng = np.random.default_rng(rows * k + n_parts)
        return cls(
            x=rng.normal(0, 3, (rows, k)).astype(np.float32),
            parts=rng.normal(0, 1, (rows, n_parts, k)).astype(np.float32),
            part_weights=rng.uniform(0, 1, (rows, n_parts)).astype(np.float32),
            norm_weight=rng.normal(1, 0.3, k).astype(np.float32),
        )

    def row(self, row: int) -> Inputs:
        one = slice(row, row + 1)
        return Inputs(self.x[one], self.parts[one], self.part_weights[one], self.norm_weight)


@dataclass(frozen=True)
class Outputs:
    x: Array
    h: Array
    q: Array
    scale: Array
    sums: Array

    def arrays(self) -> tuple[Array, ...]:
        return self.x, self.h, self.q, self.scale, self.sums


def run_add_norm(device: Device, inputs: Inputs, *, weighted: bool = True) -> Outputs:
    """With SPARE rows more than the step has, which must stay as they were."""
    rows, k = inputs.x.shape
    x = poisoned(device, (rows + SPARE, k), "float32")
    device.write(x.view(0, (rows, k)), inputs.x)
    h, out = poisoned(device, (rows + SPARE, k), "float32"), poisoned_activations(device, rows + SPARE, k)
    n_parts = inputs.parts.shape[1]
    spare = np.full((SPARE, n_parts, k), np.nan, np.float32)
    parts = np.concatenate([inputs.parts, spare])
    part_weights = np.concatenate([inputs.part_weights, spare[:, :, 0]])
    add_norm(
        device,
        step_of(device, rows),
        x,
        upload(device, parts) if n_parts else None,
        upload(device, part_weights) if n_parts and weighted else None,
        n_parts,
        upload(device, inputs.norm_weight),
        EPS,
        h,
        out,
        rows + SPARE,
    )
    outputs = Outputs(*(download(device, buffer) for buffer in (x, h, out.q, out.scale, out.sums)))
    assert all(is_poison(array[rows:]) for array in outputs.arrays())
    return Outputs(*(array[:rows] for array in outputs.arrays()))


def poisoned_activations(device: Device, rows: int, k: int) -> Activations:
    out = Activations.empty(device, rows, k)
    for buffer in (out.q, out.scale, out.sums):
        device.fill(buffer, 0xA5)
    return out


def quantized(x: Array) -> tuple[Array, Array, Array]:
    """The 8-bit rows of x [rows, k] float32: q, scale, sums."""
    rows, k = x.shape
    groups = np.zeros((rows, -(-k // 256) * 256), np.float32)
    groups[:, :k] = x
    groups = groups.reshape(rows, -1, 256)
    peak = np.abs(groups).max(axis=2)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    q = np.rint(groups * inverse[:, :, None]).astype(np.int8)
    sums = np.concatenate([q.reshape(rows, -1, 256 // n, n).sum(axis=3, dtype=np.int16) for n in (16, 32)], axis=2)
    return q.reshape(rows, -1), peak / np.float32(127), sums


def assert_norm(inputs: Inputs, outputs: Outputs, weights: Array) -> None:
    """x within 1e-6 of its largest term, h within 2e-6 of the oracle on that x, its 8-bit rows exact."""
    exact = inputs.x + np.einsum("rp,rpk->rk", weights.astype(np.float64), inputs.parts)
    np.testing.assert_allclose(outputs.x, exact, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(outputs.h, ops.rms_norm(outputs.x, inputs.norm_weight, EPS), rtol=2e-6)
    for array, expected in zip((outputs.q, outputs.scale, outputs.sums), quantized(outputs.h), strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 17, 31, 32, 33])
def test_add_norm_agrees_with_numpy(device: Device, rows: int) -> None:
    """Weighted parts are added to x, and the norm of the sum comes in float32 and in 8 bits."""
    inputs = Inputs.random(rows, 576)
    assert_norm(inputs, run_add_norm(device, inputs), inputs.part_weights)


@pytest.mark.parametrize("k", [32, 256, 576, 2048, 2336])
def test_add_norm_takes_any_width(device: Device, k: int) -> None:
    """Widths that are no whole number of groups, and such that take several rounds of the block."""
    inputs = Inputs.random(2, k)
    assert_norm(inputs, run_add_norm(device, inputs), inputs.part_weights)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.parametrize("k", [4096, 7168, 16384])
def test_add_norm_on_large_steps(device: Device, k: int) -> None:
    """The widths of large models at 256 rows."""
    inputs = Inputs.random(256, k, 8)
    assert_norm(inputs, run_add_norm(device, inputs), inputs.part_weights)


def test_parts_without_weights_are_added_as_they_are(device: Device) -> None:
    """Null weights make a plain sum, in the order of the parts."""
    inputs = Inputs.random(3, 256, 2)
    outputs = run_add_norm(device, inputs, weighted=False)
    assert_same_bits(outputs.x, inputs.x + inputs.parts[:, 0] + inputs.parts[:, 1])
    assert_norm(inputs, outputs, np.ones_like(inputs.part_weights))


def test_without_parts_x_stays(device: Device) -> None:
    """n_parts 0 is a plain norm."""
    inputs = Inputs.random(3, 576, 0)
    outputs = run_add_norm(device, inputs)
    assert_same_bits(outputs.x, inputs.x)
    assert_norm(inputs, outputs, inputs.part_weights)


@pytest.mark.parametrize("k", [256, 576, 2048])
def test_rows_are_the_same_alone_and_in_a_batch(device: Device, k: int) -> None:
    """Bitwise row invariance of every output."""
    inputs = Inputs.random(17, k)
    together = run_add_norm(device, inputs)
    for row in range(17):
        alone = run_add_norm(device, inputs.row(row))
        for one, all_rows in zip(alone.arrays(), together.arrays(), strict=True):
            assert_same_bits(one[0], all_rows[row])


@pytest.mark.parametrize("with_h", [True, False])
def test_output_norm_takes_the_wanted_rows(device: Device, with_h: bool) -> None:
    """Row out_rows[i] of x and parts becomes row i, with the bits that add_norm gives; x is not written."""
    inputs = Inputs.random(8, 576)
    wanted = np.array([6, 1, 7, 0, 0], np.int32)  # two are beyond step[1]
    x = upload(device, inputs.x)
    h, out = poisoned(device, (5, 576), "float32"), poisoned_activations(device, 5, 576)
    output_norm(
        device,
        step_of(device, 8, 3),
        upload(device, wanted),
        x,
        upload(device, inputs.parts),
        upload(device, inputs.part_weights),
        3,
        upload(device, inputs.norm_weight),
        EPS,
        h if with_h else None,
        out,
        5,
    )
    expected = run_add_norm(device, inputs)
    assert_same_bits(download(device, x), inputs.x)
    written = [(out.q, expected.q), (out.scale, expected.scale), (out.sums, expected.sums)]
    if with_h:
        written.append((h, expected.h))
    else:
        assert is_poison(download(device, h))
    for buffer, all_rows in written:
        array = download(device, buffer)
        assert_same_bits(array[:3], all_rows[wanted[:3]])
        assert is_poison(array[3:])


@pytest.mark.parametrize(("rows", "factor"), [(1, 1), (2, 8), (33, 1)])
@pytest.mark.parametrize("k", [96, 768, 2048])
def test_quantize_is_exact(device: Device, rows: int, factor: int, k: int) -> None:
    """The 8-bit rows are those of the formula, for rows times the factor, and no more."""
    n = rows * factor
    x = np.random.default_rng(k + n).normal(0, 1, (n + SPARE, k)).astype(np.float32)
    x[0, :64] = 0
    x[-3] = 0
    out = poisoned_activations(device, n + SPARE, k)
    quantize(device, step_of(device, rows), factor, upload(device, x), out, n + SPARE)
    for buffer, expected in zip((out.q, out.scale, out.sums), quantized(x[:n]), strict=True):
        array = download(device, buffer)
        np.testing.assert_array_equal(array[:n], expected)
        assert is_poison(array[n:])


def test_quantize_of_extreme_values(device: Device) -> None:
    """A group too small for a finite 127 / maximum counts as zeros; NaN and infinities show in the scale."""
    x = np.zeros((1, 1024), np.float32)
    x[0, 3] = 1e-38
    x[0, 256 + 7] = np.nan
    x[0, 512 + 9] = -np.inf
    x[0, 768:] = 1e-34
    out = poisoned_activations(device, 1, 1024)
    quantize(device, step_of(device, 1), 1, upload(device, x), out, 1)
    scale, q = download(device, out.scale)[0], download(device, out.q)[0]
    assert scale[0] == 0
    assert np.isnan(scale[1])
    assert scale[2] == np.inf
    assert (q[:768] == 0).all()
    assert (q[768:] == 127).all()


@pytest.mark.parametrize("peak", [1e-29, 1e-10, 3.0, 1e20, 3.4e38])
def test_quantize_is_exact_at_any_size(device: Device, peak: float) -> None:
    """Quotients are rounded as a division rounds them, up to the largest floats."""
    x = (np.random.default_rng(0).uniform(-1, 1, (8, 2048)) * peak).astype(np.float32)
    out = poisoned_activations(device, 8, 2048)
    quantize(device, step_of(device, 8), 1, upload(device, x), out, 8)
    for buffer, expected in zip((out.q, out.scale, out.sums), quantized(x), strict=True):
        np.testing.assert_array_equal(download(device, buffer), expected)
