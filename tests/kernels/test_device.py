"""Devices: what machine.cuh offers does what it says, on the CPU's emulator and on a GPU; graphs, copies and errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.errors import EngineError
from shared.kernels.device import Argument, Buffer, Device
from shared.kernels.gpu import CudaDevice
from shared.kernels.host.device import HostDevice
from shared.quant.codecs import dequantize
from shared.quant.types import Q4_K
from tests.kernels.arrays import Array, download, poisoned, upload
from tests.kernels.conftest import BACKENDS, SEVERAL, open_several, require

SOURCES = Path(__file__).parent / "cuda"
FILE = "probe.cu"
GOOD = [
    "scale",
    "shuffles",
    "votes",
    "reverse",
    "large",
    "atomics",
    "product_s8_k32",
    "product_s8_k16",
    "product_f16_k16",
    "copies<1>",
    "copies<2>",
    "integers",
    "widen",
    "narrow",
    "arithmetic",
    "decode<Q4K>",
    "early_return",
]
UNDEFINED = [
    "copies<0>",
    "divergent_lanes",
    "divergent_warps",
    "half_a_warp",
    "mma_without_lane",
    "past_shared",
    "misaligned_copy",
    "forgotten_barrier",
]


@pytest.fixture(scope="module")
def host() -> Iterator[HostDevice]:
    """The emulator, for what a GPU leaves undefined."""
    require("host")
    device = HostDevice(SOURCES)
    device.prepare([(FILE, name) for name in GOOD + UNDEFINED])
    yield device
    device.close()


@pytest.fixture(scope="module", params=BACKENDS)
def probes(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A device for the kernels of probe.cu."""
    require(request.param)
    if request.param == "host":
        yield request.getfixturevalue("host")
    else:
        device = CudaDevice(sources=SOURCES)
        device.prepare([(FILE, name) for name in GOOD])
        yield device
        device.close()


def run(
    device: Device, name: str, grid: tuple[int, ...], block: int, *arguments: Argument | Array, shared: int = 0
) -> list[Array]:
    """Launches a kernel on copies of the arrays among its arguments, and returns these as they are afterwards."""
    on_device = [upload(device, a) if isinstance(a, np.ndarray) else a for a in arguments]
    device.launch(device.kernel(FILE, name), grid, block, on_device, shared)
    return [download(device, a) for a in on_device if isinstance(a, Buffer)]


def void(call: Callable[[], object]) -> None:
    call()


def blank(n: int, dtype: str) -> Array:
    return np.zeros(n, dtype)


@pytest.mark.parametrize("mask", [1, 8, 31])
def test_shuffles_exchange_values_within_a_warp(probes: Device, mask: int) -> None:
    """Of every type, across both warps of a block."""
    outputs = [blank(64, dtype) for dtype in ("float32", "int32", "float64", "uint64", "float32", "int32")]
    floats, ints, doubles, longs, from_, source = run(probes, "shuffles", (1,), 64, mask, *outputs)
    i = np.arange(64)
    other, lane = i ^ mask, i // 32 * 32 + 7 * i % 32
    np.testing.assert_array_equal(floats, other + np.float32(0.5))
    np.testing.assert_array_equal(ints, other)
    np.testing.assert_array_equal(doubles, other + 0.25)
    np.testing.assert_array_equal(longs, other.astype(np.uint64) << np.uint64(40))
    np.testing.assert_array_equal(from_, lane + np.float32(0.5))
    np.testing.assert_array_equal(source, lane)


def test_votes_are_counted_by_warp_and_by_block(probes: Device) -> None:
    """A vote has a bit per lane, and every thread learns the block's count."""
    x = np.random.default_rng(1).integers(0, 100, 128, np.int32)
    _, words, count = run(probes, "votes", (1,), 128, x, blank(4, "uint32"), blank(128, "int32"))
    odd = (x % 2).reshape(4, 32)
    np.testing.assert_array_equal(words, (odd.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1))
    np.testing.assert_array_equal(count, odd.sum() * 100 + np.repeat(odd.sum(1), 32))


@pytest.mark.parametrize("grid", [(6,), (3, 2), (1, 2, 3)])
def test_barriers_order_a_blocks_shared_memory(probes: Device, grid: tuple[int, ...]) -> None:
    """Dynamic and static shared memory, in grids of every dimension."""
    x = np.arange(6 * 256, dtype=np.int32)
    _, reversed_, sums = run(probes, "reverse", grid, 256, x, blank(6 * 256, "int32"), blank(6, "int32"), shared=1024)
    np.testing.assert_array_equal(reversed_.reshape(6, 256), x.reshape(6, 256)[:, ::-1])
    np.testing.assert_array_equal(sums, x.reshape(6, 256).sum(1))


@pytest.mark.parametrize("kib", [16, 99])
def test_a_block_can_have_much_shared_memory(probes: Device, kib: int) -> None:
    """Above 48 KiB a GPU wants to be asked; the device does."""
    n = kib * 256
    assert run(probes, "large", (1,), 128, 4 * n, blank(1, "int32"), shared=4 * n)[0][0] == n * (n - 1) // 2
    assert probes.blocks_per_multiprocessor(probes.kernel(FILE, "large"), 128, 4 * n) >= 1


def test_atomics_of_all_blocks_add_up(probes: Device) -> None:
    """Sums and maxima over a grid."""
    x = np.random.default_rng(2).integers(0, 1000, 512, np.int32)
    _, total, most, floats = run(
        probes, "atomics", (4,), 128, x, blank(1, "int32"), blank(1, "uint32"), blank(1, "float32")
    )
    assert (total[0], most[0], floats[0]) == (x.sum(), x.max(), x.sum())


@pytest.mark.parametrize("k", [32, 16])
def test_integer_tensor_core_products_are_exact(probes: Device, k: int) -> None:
    """The product of [16, k] and [k, 8] bytes, extremes among them."""
    rng = np.random.default_rng(k)
    a, b = rng.integers(-128, 128, (16, k), np.int8), rng.integers(-128, 128, (8, k), np.int8)
    a[3], b[5] = -128, -128
    out = run(probes, f"product_s8_k{k}", (1,), 32, a, b, blank(128, "int32"))[2]
    np.testing.assert_array_equal(out.reshape(16, 8), a.astype(np.int32) @ b.astype(np.int32).T)


def test_half_tensor_core_products_add_to_what_was_there(probes: Device) -> None:
    """1 + the product of [16, 16] and [16, 8] halves, to 1e-3."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, (16, 16)).astype(np.float16), rng.normal(0, 1, (8, 16)).astype(np.float16)
    out = run(probes, "product_f16_k16", (1,), 32, a, b, blank(128, "float32"))[2]
    np.testing.assert_allclose(out.reshape(16, 8), 1 + a.astype(np.float64) @ b.astype(np.float64).T, 1e-3, 1e-5)


def test_asynchronous_copies_are_there_after_the_wait(probes: Device) -> None:
    """Both groups when both are waited for; the first one at least when one may be under way."""
    x = np.random.default_rng(4).integers(0, 256, 1024, np.uint8)
    np.testing.assert_array_equal(run(probes, "copies<2>", (1,), 32, x, blank(1024, "uint8"), shared=1024)[1], x)
    first = run(probes, "copies<1>", (1,), 32, x, blank(1024, "uint8"), shared=1024)[1]
    np.testing.assert_array_equal(first[:512], x[:512])


@pytest.mark.parametrize("waited", [0, 1])
def test_the_emulator_shows_a_forgotten_wait_for_copies(host: HostDevice, waited: int) -> None:
    """Groups that are not waited for leave shared memory as it was: 0xA5 bytes."""
    x = np.random.default_rng(4).integers(0, 256, 1024, np.uint8)
    y = run(host, f"copies<{waited}>", (1,), 32, x, blank(1024, "uint8"), shared=1024)[1]
    assert (y[512 * waited :] == 0xA5).all()


def test_dot_products_and_permutations_of_bytes(probes: Device) -> None:
    """dot2 multiplies signed halves by unsigned bytes; permute_bytes picks from eight bytes."""
    a, b = np.random.default_rng(5).integers(0, 2**32, (2, 256), np.uint32)
    _, _, low, high, permuted = run(
        probes, "integers", (8,), 32, a, b, blank(256, "int32"), blank(256, "int32"), blank(256, "uint32")
    )
    halves, octets = a.view(np.int16).reshape(-1, 2).astype(np.int64), b.view(np.uint8).reshape(-1, 4).astype(np.int64)
    i = np.arange(256)
    np.testing.assert_array_equal(low, (halves * octets[:, :2]).sum(1) + i)
    np.testing.assert_array_equal(high, (halves * octets[:, 2:]).sum(1) - i)
    both = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
    np.testing.assert_array_equal(permuted, np.ascontiguousarray(both[:, [0, 5, 1, 7]]).view(np.uint32)[:, 0])


def test_every_half_widens_exactly(probes: Device) -> None:
    """All 65536 bit patterns; a NaN stays one."""
    halves = np.arange(65536, dtype=np.uint16)
    floats = run(probes, "widen", (1024,), 64, halves, blank(65536, "float32"))[1]
    expected = halves.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(floats[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert np.isnan(floats[nan]).all()


def test_floats_narrow_to_the_nearest_half(probes: Device) -> None:
    """Ties to even, at midpoints between all halves and beside them, and values of every size, alone and in pairs."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = ((halves[:-1] + halves[1:]) / 2).astype(np.float32)
    bits = np.random.default_rng(6).integers(0, 2**32, 30000, np.uint32)
    special = np.array([65504, 65519.996, 65520, 65536, 1e30, np.inf, -np.inf, np.nan, 0, -0.0, 1e-45], np.float32)
    x = np.concatenate(
        [middles, -middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9)), special]
    )
    x = np.concatenate([x, bits.view(np.float32)])
    x = np.pad(x, (0, -len(x) % 64))
    _, narrowed, pairs = run(probes, "narrow", (len(x) // 64,), 64, x, blank(len(x), "uint16"), blank(len(x), "uint32"))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    nan = np.isnan(x)
    np.testing.assert_array_equal(narrowed[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(narrowed.view(np.float16)[nan]).all()
    np.testing.assert_array_equal(pairs[~nan] & 0xFFFF, narrowed[~nan])
    np.testing.assert_array_equal(pairs[~nan] >> 16, narrowed[~nan] ^ 0x8000)


def test_arithmetic_rounds_as_ieee_wants(probes: Device) -> None:
    """fma, division and square root are exact to the last bit; powers are close; halves round to even integers."""
    rng = np.random.default_rng(7)
    x = np.concatenate([rng.normal(0, 20, 1020), [0.5, 1.5, -2.5, -np.inf]]).astype(np.float32)
    y = rng.uniform(0.1, 9, 1024).astype(np.float32)
    _, _, out, rounded = run(probes, "arithmetic", (16,), 64, x, y, blank(5 * 1024, "float32"), blank(1024, "int32"))
    fused, quotient, root, power2, power = out.reshape(5, 1024)
    wide_x, wide_y = x.astype(np.longdouble), y.astype(np.longdouble)
    np.testing.assert_array_equal(fused, (wide_x * wide_y - 1).astype(np.float32))
    np.testing.assert_array_equal(quotient, x / y)
    np.testing.assert_array_equal(root, np.sqrt(y))
    np.testing.assert_allclose(power2, np.exp2(wide_x).astype(np.float64), 1e-6)
    np.testing.assert_allclose(power, np.exp(wide_x).astype(np.float64), 1e-5)
    np.testing.assert_array_equal(rounded[:-1], np.rint(x[:-1]).astype(np.int32))


def test_a_codec_header_compiles_and_decodes(probes: Device) -> None:
    """Q4_K to the bit, through the codec's own repacking."""
    block = np.random.default_rng(8).integers(0, 256, 144, np.uint8)
    block[:4] = np.array([0.25, 0.5], np.float16).view(np.uint8)
    out = run(probes, "decode<Q4K>", (1,), 64, block, blank(256, "float32"))[1]
    np.testing.assert_array_equal(out, dequantize(block, Q4_K, "block"))


def test_threads_that_returned_are_not_waited_for(probes: Device) -> None:
    """A barrier is for the others."""
    out = run(probes, "early_return", (1,), 128, blank(128, "int32"))[0]
    assert out.sum() == 95


def test_a_graph_replays_on_changed_input(probes: Device) -> None:
    """A copy in, two launches and a copy out, recorded once: the staging memory is read when it is replayed."""
    x, y = probes.staging((100,), "float32"), probes.staging((100,), "float32")
    on_device, doubled = probes.zeros((100,), "float32"), probes.zeros((100,), "float32")
    kernel = probes.kernel(FILE, "scale")

    def record() -> None:
        probes.write(on_device, x)
        probes.launch(kernel, (2,), 64, [on_device, doubled, 100, 2.0])
        probes.launch(kernel, (2,), 64, [doubled, doubled, 100, 2.0])
        probes.read(y, doubled)
        probes.fill(on_device, 0)

    graph = probes.capture(record)
    probes.synchronize()
    assert (y == 0).all()
    for start in (1, 50):
        x[:] = np.arange(start, start + 100)
        graph.replay()
        probes.synchronize()
        np.testing.assert_array_equal(y, 4 * x)
        assert (download(probes, on_device) == 0).all()


def test_a_capture_refuses_what_a_graph_cannot_do(probes: Device) -> None:
    """Copies of pageable memory, waiting, and captures inside; the device works on afterwards."""
    buffer = probes.zeros((4,), "float32")
    array = np.ones(4, np.float32)
    refused: list[Callable[[], object]] = [
        lambda: probes.write(buffer, array),
        lambda: probes.read(array, buffer),
        probes.synchronize,
        lambda: probes.capture(lambda: None),
        lambda: probes.empty((4,), "float32"),
    ]
    for call in refused:
        with pytest.raises(ValueError, match="capture"):
            probes.capture(functools.partial(void, call))
    probes.write(buffer, array)
    np.testing.assert_array_equal(download(probes, buffer), array)


def test_views_are_parts_of_their_buffer(probes: Device) -> None:
    """Writing a view writes that part alone, and copies must have the right size and layout."""
    buffer = poisoned(probes, (64,), "uint8")
    probes.write(buffer.view(16, (4,), "float32"), np.arange(4, dtype=np.float32))
    out = download(probes, buffer)
    np.testing.assert_array_equal(out[16:32].view(np.float32), np.arange(4))
    assert (out[:16] == 0xA5).all()
    assert (out[32:] == 0xA5).all()
    with pytest.raises(ValueError, match="64"):
        probes.write(buffer, np.zeros(65, np.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        probes.write(buffer, np.zeros((8, 16), np.uint8)[:, ::2])


def test_pageable_memory_may_be_reused_at_once(probes: Device) -> None:
    """Of every write, what the array held then arrives."""
    array = np.ones(1000, np.float32)
    buffers = []
    for value in range(5):
        array[:] = value
        buffers.append(upload(probes, array))
        array[:] = -1
    assert [download(probes, buffer)[999] for buffer in buffers] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", SEVERAL)
def test_copies_to_another_device_keep_their_turn(kind: str) -> None:
    """Each copy takes what was asked for before it on one device, and comes before and after what the other one was
    asked for: in a chain through three buffers that are written again at once, without waiting, no step is lost."""
    # On a GPU a step takes longer than asking for it.
    n, n_steps = 1 << 24 if kind != "host" else 1 << 12, 8
    first, second = open_several(kind, 2, SOURCES)
    kernels = [device.kernel(FILE, "scale") for device in (first, second)]
    x, y = poisoned(first, (n,), "float32"), poisoned(second, (n,), "float32")
    out = [poisoned(second, (n,), "float32") for _ in range(n_steps)]
    step = [upload(first, np.full(n, i, np.float32)) for i in range(n_steps)]
    for i in range(n_steps):
        first.launch(kernels[0], (n // 64,), 64, [step[i], x, n, 2.0])
        first.copy_to(second, y, x)
        second.launch(kernels[1], (n // 64,), 64, [y, out[i], n, 3.0])
    got = [download(second, part) for part in out]
    assert [(part.min(), part.max()) for part in got] == [(6 * i, 6 * i) for i in range(n_steps)]
    # And back.
    second.copy_to(first, x.view(0, (n // 2,)), out[5].view(0, (n // 2,)))
    assert [part.max() for part in download(first, x).reshape(2, -1)] == [30, 2 * (n_steps - 1)]
    for device in (first, second):
        device.close()


def test_copies_to_another_device_that_are_refused(probes: Device) -> None:
    """Of another size, and in a capture of either device."""
    [other] = [HostDevice(SOURCES)] if isinstance(probes, HostDevice) else open_several("gpu", 1, SOURCES)
    x, y = probes.zeros((4,), "float32"), other.zeros((4,), "float32")
    with pytest.raises(ValueError, match="16 bytes into one of 8"):
        probes.copy_to(other, y.view(0, (2,)), x)
    for device in (probes, other):
        with pytest.raises(ValueError, match="capture"):
            device.capture(lambda: probes.copy_to(other, y, x))
    probes.fill(x, 1)
    probes.copy_to(other, y, x)
    assert (download(other, y).view(np.uint8) == 1).all()
    other.close()


def test_a_late_device_shows_what_nobody_waits_for() -> None:
    """The emulator's late device does nothing before it must: what is read too early is not there, staging memory that
    is changed too early arrives changed. This is what tests of several devices rest on."""
    first, second = open_several("host", 2, SOURCES)
    x, y = first.zeros((4,), "float32"), second.zeros((4,), "float32")
    source, target = first.staging((4,), "float32"), np.zeros(4, np.float32)
    source[:] = 1
    first.write(x, source)
    first.copy_to(second, y, x)
    second.read(target, y)
    source[:] = 2
    assert (target == 0).all()
    second.synchronize()
    assert (target == 2).all()
    first.write(x, np.full(4, 3, np.float32))
    second.read(target, y)
    first.copy_to(second, y, x)
    second.synchronize()
    assert (target == 2).all()
    assert (download(second, y) == 3).all()


def test_a_device_says_what_it_is_and_has(probes: Device) -> None:
    """Name, multiprocessors, memory; new staging memory is zero; asking for too much memory is out_of_memory."""
    free, total = probes.memory()
    assert probes.name
    assert probes.n_multiprocessors > 0
    assert 0 < free <= total
    assert (probes.staging((3, 5), "int32") == np.zeros((3, 5), np.int32)).all()
    assert probes.empty((3,), "uint8").address % 256 == 0
    with pytest.raises(EngineError, match="GiB") as caught:
        probes.empty((1 << 46,), "float32")
    assert caught.value.code == "out_of_memory"


def test_wrong_arguments_are_refused(probes: Device) -> None:
    """By number and kind, naming the kernel and the argument; wrong grids too."""
    kernel, x = probes.kernel(FILE, "scale"), probes.zeros((64,), "float32")
    with pytest.raises(TypeError, match=r"scale takes 4 arguments .* got 3"):
        probes.launch(kernel, (1,), 64, [x, x, 64])
    with pytest.raises(TypeError, match="argument 2 is a buffer"):
        probes.launch(kernel, (1,), 64, [x, x, x, 1.0])
    with pytest.raises(TypeError, match=r"argument 0 is 1\.5"):
        probes.launch(kernel, (1,), 64, [1.5, x, 64, 1.0])
    with pytest.raises(TypeError, match="argument 2 is 4294967296"):
        probes.launch(kernel, (1,), 64, [x, x, 2**32, 1.0])
    with pytest.raises(ValueError, match="grid"):
        probes.launch(kernel, (0,), 64, [x, x, 64, 1.0])
    with pytest.raises(ValueError, match="warps"):
        probes.launch(kernel, (1,), 48, [x, x, 64, 1.0])


def test_the_emulator_also_tells_integers_from_floats(host: HostDevice) -> None:
    """A GPU's driver knows only sizes."""
    kernel, x = host.kernel(FILE, "scale"), host.zeros((64,), "float32")
    with pytest.raises(TypeError, match="argument 3 is 1, but the parameter is a float32"):
        host.launch(kernel, (1,), 64, [x, x, 64, 1])
    with pytest.raises(TypeError, match="argument 0 is 5, but the parameter is a pointer"):
        host.launch(kernel, (1,), 64, [5, x, 64, 1.0])


def test_a_kernel_that_does_not_compile_is_reported(probes: Device) -> None:
    """With the compiler's first errors; so is a file that is not there."""
    with pytest.raises(EngineError, match=r"probe\.cu does not compile(.|\n)*nothing_like_it") as caught:
        probes.kernel(FILE, "nothing_like_it<3>")
    assert caught.value.code == "device_failed"
    with pytest.raises(EngineError, match=r"no kernel file .*absent\.cu"):
        probes.kernel("absent.cu", "scale")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("divergent_lanes", r"divergence, threads of a warp .* at shuffle .*probe\.cu:\d+.* at sync_warp"),
        ("divergent_warps", r"divergence, threads of a block .* at sync_block_count .* at sync_block"),
        ("half_a_warp", r"deadlock, .*thread 0 at shuffle .*thread 16 at sync_block"),
        ("misaligned_copy", r"copy_async .*: an address is no multiple of 16"),
    ],
)
def test_the_emulator_finds_what_a_gpu_leaves_undefined(host: HostDevice, name: str, complaint: str) -> None:
    """As an error that says where; the next launch is unharmed."""
    out = host.zeros((64,), "int32")
    with pytest.raises(EngineError, match=f"{name}: block .*{complaint}") as caught:
        host.launch(host.kernel(FILE, name), (1,), 64 if "copy" not in name else 32, [out], shared=64)
    assert caught.value.code == "device_failed"
    assert run(host, "early_return", (1,), 128, blank(128, "int32"))[0].sum() == 95


@pytest.mark.parametrize("lane", [0, 3, 31])
def test_the_emulator_finds_a_product_without_all_lanes(host: HostDevice, lane: int) -> None:
    """Whichever lane has returned from the kernel."""
    with pytest.raises(EngineError, match=r"mma_s8_k16 .*: a lane of the warp has already returned"):
        host.launch(host.kernel(FILE, "mma_without_lane"), (1,), 64, [host.zeros((64,), "int32"), lane])


def test_the_emulator_finds_writes_outside_memory(host: HostDevice) -> None:
    """Past the dynamic shared memory, and past a buffer."""
    kernel = host.kernel(FILE, "past_shared")
    host.launch(kernel, (1,), 32, [99], shared=100)
    with pytest.raises(EngineError, match="past the end of the dynamic shared memory"):
        host.launch(kernel, (1,), 32, [100], shared=100)
    x = host.zeros((64,), "float32")
    with pytest.raises(EngineError, match="scale wrote outside the buffer of argument 1"):
        host.launch(host.kernel(FILE, "scale"), (1,), 64, [x, host.empty((63,), "float32"), 64, 1.0])


@pytest.mark.parametrize("source", [0, 63])
def test_the_emulator_shows_a_forgotten_barrier(host: HostDevice, source: int) -> None:
    """Whichever thread of a block writes, one of two blocks has readers that run before it."""
    out = run(host, "forgotten_barrier", (2,), 64, blank(128, "int32"), source)[0].reshape(2, 64)
    assert not (out == [[7], [8]]).all()


def test_new_memory_is_poisoned_by_the_emulator(host: HostDevice) -> None:
    """Reading what nobody wrote shows."""
    assert (download(host, host.empty((100,), "uint8")) == 0xA5).all()
