"""The cuda engine on several devices: the bits of one device, in shares of its memory, with as little copied as can be.

On the emulator the devices are late (`DeferringDevice`): what nothing waits for shows. On GPUs ("gpu": all on the first
one, "gpus": each on its own) the same is tried.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
import structlog

from services.draft.drafters import ModelDrafter
from shared.engine.cuda import passes
from shared.engine.cuda.engine import CudaEngine
from shared.engine.cuda.weights import load_weights, measure_weights
from shared.engine.interface import Chunk, EngineSettings, Proposer
from shared.errors import EngineError
from shared.kernels.device import Buffer, Device
from shared.messages import OpenDraft
from shared.model.config import ModelConfig
from shared.model.gguf import GGUFFile
from shared.sampling.params import SamplingParams
from shared.speculation.draft_session import DraftSession
from tests.engine.conftest import ModelPath, open_device
from tests.engine.tiny_models import TinyModel
from tests.kernels.arrays import assert_same_bits
from tests.kernels.conftest import SEVERAL, open_several, require
from tests.kernels.deferring import DeferringDevice

MOE = TinyModel(types=(("attn_v", "Q6_K"), ("ffn_down_exps", "Q5_K")), n_layer=3, tied=True)
MODELS = {
    "qwen3moe": MOE,
    "qwen3": TinyModel("qwen3", "Q8_0", n_layer=3, rope_dim=32),
    "llama": TinyModel("llama", "F32", n_layer=4, rope_factors=True),
}
GREEDY = SamplingParams(temperature=0.0)


def settings_for(path: Path) -> EngineSettings:
    return EngineSettings(engine="cuda", model=str(path), n_ctx=160, n_slots=3, n_batch=48)


def random_tokens(n: int, seed: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 300, n).astype(np.int32)


def story(engine: CudaEngine) -> list[npt.NDArray[np.float32]]:
    """All that a session may go through, in passes of few and of many rows, and what logits were read on the way."""
    a, b = random_tokens(160, 1), random_tokens(160, 2)
    seen: list[npt.NDArray[np.float32]] = []

    def forward(*chunks: Chunk) -> None:
        logits = engine.forward(chunks)
        seen.extend(logits.dense(row).copy() for row in range(logits.n_rows))

    def unread(*chunks: Chunk) -> None:
        engine.forward(chunks)

    # A prompt in pieces, with another session; several of a capacity at once, which must not mix up their inputs.
    unread(Chunk(0, 0, a[:48], 0))
    forward(Chunk(0, 48, a[48:70], 5))
    unread(Chunk(1, 0, b[:20], 0))
    unread(Chunk(1, 20, b[20:40], 0))
    unread(Chunk(0, 70, a[70:80], 1), Chunk(1, 40, b[40:50], 0))
    forward(Chunk(1, 50, b[50:60], 2), Chunk(0, 80, a[80:90], 1))
    for at in range(90, 93):
        forward(Chunk(0, at, a[at : at + 1], 1))
    # Rolled back by an earlier start, and by truncation.
    forward(Chunk(0, 70, b[:4], 4))
    engine.truncate(0, 61)
    forward(Chunk(0, 61, a[61:66], 5), Chunk(1, 60, b[60:61], 1))
    # A fork within a page, and both go on.
    engine.copy_prefix(0, 2, 63)
    forward(Chunk(2, 63, b[63:66], 3), Chunk(0, 66, a[66:67], 1))
    forward(Chunk(0, 63, a[63:100], 3), Chunk(2, 66, b[66:70], 4))
    # And all questions.
    logits = engine.forward([Chunk(0, 100, a[100:103], 3)])
    ids, values = logits.top(200)
    rare = np.argsort(logits.dense(1))[:5].astype(np.int32)
    seen += [ids.astype(np.float32), values, logits.gather(1, rare), logits.log_sum_exp().astype(np.float32)]
    return seen


@pytest.fixture(scope="module")
def truth(model_path: ModelPath) -> Callable[[str, str], list[npt.NDArray[np.float32]]]:
    """The story on one device, by backend and architecture."""
    told: dict[tuple[str, str], list[npt.NDArray[np.float32]]] = {}

    def tell(backend: str, architecture: str) -> list[npt.NDArray[np.float32]]:
        if (backend, architecture) not in told:
            settings = settings_for(model_path(MODELS[architecture]))
            engine = CudaEngine(settings, devices=[open_device(backend)])
            told[backend, architecture] = story(engine)
            engine.close()
        return told[backend, architecture]

    return tell


@pytest.mark.parametrize(
    ("architecture", "n", "graphs"),
    [
        ("qwen3moe", 2, True),
        ("qwen3moe", 2, False),
        ("qwen3moe", 3, True),
        ("qwen3", 2, True),
        ("qwen3", 3, False),
        ("llama", 2, True),
        ("llama", 3, True),
    ],
)
@pytest.mark.parametrize("kind", SEVERAL)
def test_several_devices_have_the_bits_of_one(
    kind: str,
    architecture: str,
    n: int,
    graphs: bool,
    truth: Callable[[str, str], list[npt.NDArray[np.float32]]],
    model_path: ModelPath,
) -> None:
    """Logits and all that is asked of them, for several sessions, rolled back and forked, in graphs or not."""
    devices = open_several(kind, n)
    engine = CudaEngine(settings_for(model_path(MODELS[architecture])), devices=devices, graphs=graphs)
    got = story(engine)
    engine.close()
    expected = truth("host" if kind == "host" else "gpu", architecture)
    assert len(got) == len(expected) > 30
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.gpu
def test_the_settings_name_the_gpus(
    truth: Callable[[str, str], list[npt.NDArray[np.float32]]], model_path: ModelPath
) -> None:
    """devices = [1, 0]: the first layers on the second GPU."""
    for device in open_several("gpus", 2):
        device.close()
    engine = CudaEngine(replace(settings_for(model_path(MOE)), devices=(1, 0)))
    assert [device.name[:5] for device in engine._devices] == ["GPU 1", "GPU 0"]
    for one, other in zip(story(engine), truth("gpu", "qwen3moe"), strict=True):
        assert_same_bits(one, other)
    engine.close()


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def late() -> list[DeferringDevice]:
    return [device for device in open_several("host", 3) if isinstance(device, DeferringDevice)]


def test_a_pass_is_a_graph_and_one_more_kernel_for_each_device(
    late: list[DeferringDevice], model_path: ModelPath
) -> None:
    """One device: no more launches than its layers need, nothing copied. Each further one: a sum at the end of the
    layers before it, and the rows of the residual stream that there are, not those there is room for."""
    launches = {}
    for n in (1, 2, 3):
        devices = late[:n]
        engine = CudaEngine(settings_for(model_path(MOE)), devices=devices)
        engine.forward([Chunk(0, 0, random_tokens(5, 1), 1)]).top(1)
        for device in devices:
            device.n_launches = device.n_replays = 0
            device.copied_bytes.clear()
        engine.forward([Chunk(0, 5, random_tokens(5, 1), 1)]).top(1)
        engine.forward([Chunk(0, 10, random_tokens(6, 1), 1)]).top(1)
        assert [device.n_replays for device in devices] == [2] * n
        assert [device.n_launches for device in devices] == [0] * n
        row = MOE.n_embd * 4
        assert [device.copied_bytes for device in devices] == [[5 * row, 6 * row]] * (n - 1) + [[]]
        engine.close()
        # Without graphs, to count.
        plain = CudaEngine(settings_for(model_path(MOE)), devices=late[:n], graphs=False)
        before = sum(device.n_launches for device in devices)
        plain.forward([Chunk(0, 0, random_tokens(5, 1), 1)]).top(1)
        launches[n] = sum(device.n_launches for device in devices) - before
        plain.close()
    assert launches[2] == launches[1] + 1
    assert launches[3] == launches[1] + 2


class Watched(DeferringDevice):
    """Knows what it has allocated, and fails after so many allocations."""

    def __init__(self, name: str = "watched") -> None:
        super().__init__(name=name)
        self.n_bytes = 0
        self.owners: list[weakref.ref[object]] = []
        self.fails_after: int | None = None

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        if self.fails_after is not None:
            if self.fails_after == 0:
                raise EngineError(f"{self.name} has no room", code="out_of_memory")
            self.fails_after -= 1
        buffer = super().empty(shape, dtype)
        self.n_bytes += buffer.nbytes
        self.owners.append(weakref.ref(buffer.owner))
        return buffer

    @property
    def n_held(self) -> int:
        self.synchronize()  # what is not done yet holds its buffers
        return sum(owner() is not None for owner in self.owners)


@pytest.mark.parametrize("model", [replace(MOE, n_expert=16), MODELS["qwen3"]], ids=str)
def test_weights_take_the_memory_that_is_planned(model: TinyModel, model_path: ModelPath) -> None:
    """On each device its layers, and the embedding or the output; a tied matrix is on both ends."""
    require("host")
    devices = [Watched(), Watched(), Watched()]
    seen: list[tuple[int, int]] = []
    with GGUFFile.open(model_path(model)) as file:
        config = ModelConfig.read(file)
        planned = measure_weights(file, config)
        shares = [range(1), range(1, 2), range(2, 3)]
        loaded = load_weights(devices, shares, file, config, lambda done, total, _name: seen.append((done, total)))
    ends = [planned.embedding, 0, planned.output + (planned.embedding if model.tied else 0)]
    assert [device.n_bytes for device in devices] == [
        end + layer + planned.loading for end, layer in zip(ends, planned.layers, strict=True)
    ]
    assert [weights.embedding is not None for weights in loaded] == [True, False, False]
    assert [weights.output is not None for weights in loaded] == [False, False, True]
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert [done == total for done, total in seen].count(True) == 1


def test_the_log_says_what_is_where(model_path: ModelPath) -> None:
    """One line names the layers of each device, and progress the device that is being loaded."""
    require("host")
    with structlog.testing.capture_logs() as logs:
        CudaEngine(settings_for(model_path(MOE)), devices=[Watched("first"), Watched("second")]).close()
    [placed] = [line for line in logs if line["event"] == "model_placed"]
    # Half a GiB: what is kept free, and room for attention's splits.
    assert placed["devices"] == ["first: layers 0 to 1, 0.5 GiB", "second: layers 2 to 2, 0.5 GiB"]
    assert placed["model"] == str(model_path(MOE))
    progress = [line for line in logs if line["event"] == "model_loading"]
    assert (progress[-1]["device"], progress[-1]["done"]) == ("second", 1.0)


# --- what is refused, and what is left behind -------------------------------------------------------------------------


def test_a_failed_copy_of_pages_leaves_no_gap(
    late: list[DeferringDevice], model_path: ModelPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork that goes on in the middle of a shared page, which could not be copied, keeps only the pages before it."""
    engine = CudaEngine(settings_for(model_path(MOE)), devices=late[:1])
    tokens = random_tokens(100, 1)
    for start in (0, 48, 96):
        engine.forward([Chunk(0, start, tokens[start : start + 48], 1)])
    truth = engine.forward([Chunk(0, 99, tokens[99:], 1)]).dense(0)
    engine.copy_prefix(0, 1, 90)
    with monkeypatch.context() as patch:
        patch.setattr(engine._passes, "copy_pages", Mock(side_effect=EngineError("lost", code="device_failed")))
        with pytest.raises(EngineError, match="lost"):
            engine.forward([Chunk(1, 90, tokens[90:], 1)])
    assert engine.length(1) == 64
    assert_same_bits(engine.forward([Chunk(1, 64, tokens[64:], 1)]).dense(0), truth)
    assert_same_bits(engine.forward([Chunk(0, 99, tokens[99:], 1)]).dense(0), truth)


def test_numbers_of_passes_begin_anew(late: list[DeferringDevice], model_path: ModelPath) -> None:
    """After 2^31 passes, also in the middle of a chain, whose tokens are still waited for."""
    first = [Chunk(slot, 0, random_tokens(9, slot), 1) for slot in range(2)]
    seen = []
    for number in (0, passes._MOST_NUMBER - 3):
        engine = CudaEngine(settings_for(model_path(MOE)), devices=late[:1])
        assert engine._passes is not None
        engine.forward(first).top(1)
        engine._passes._number = number
        ids = [engine.forward([Chunk(0, 9, random_tokens(1, 5), 1)]).dense(0)]
        chunks = [Chunk(slot, 9, random_tokens(1, 7), 1) for slot in range(2)]
        proposed = engine.propose(chunks, [GREEDY] * 2, 6)
        ids += [engine.forward([Chunk(1, 15, random_tokens(2, 8), 1)]).dense(0), proposed.tokens, proposed.confidences]
        seen.append(ids)
        assert engine._passes._number < 20
    for array, other in zip(*seen, strict=True):
        assert_same_bits(array, other)


def test_a_device_that_lacks_memory_is_named(late: list[DeferringDevice], model_path: ModelPath) -> None:
    """Before anything is loaded: which one, and how much is missing."""
    for device, gib in zip(late, (4, 1, 4), strict=True):
        device.free_bytes = gib << 30
    # 3 layers, keys and values in halves, 2 heads of 64, 6 Mi tokens: 3 GiB each.
    settings = replace(settings_for(model_path(MOE)), n_ctx=1024, n_slots=6144)
    with pytest.raises(EngineError, match=r"9\.0 GiB of KV cache") as caught:
        CudaEngine(settings, devices=late)
    assert caught.value.message.endswith("2.5 GiB are missing on host 1 (1.0 of 1024.0 GiB free)")
    assert caught.value.code == "out_of_memory"
    assert "name more devices" in caught.value.remedy
    assert [device.n_launches for device in late] == [0, 0, 0]


def test_more_devices_than_layers_are_refused(model_path: ModelPath) -> None:
    """Rather than left idle."""
    with pytest.raises(EngineError, match="3 layers, fewer than the 4 devices") as caught:
        CudaEngine(settings_for(model_path(MOE)), devices=open_several("host", 4))
    assert caught.value.code == "bad_settings"


def why_not(settings: EngineSettings, devices: list[Device]) -> str:
    try:
        CudaEngine(settings, devices=devices)
    except EngineError as e:
        return e.code
    return ""


def test_an_engine_that_cannot_be_built_leaves_nothing_behind(model_path: ModelPath) -> None:
    """Whether memory ends while weights are loaded or while room for passes is made, on either device."""
    require("host")
    settings = settings_for(model_path(MOE))
    devices = [Watched(), Watched()]
    CudaEngine(settings, devices=devices).close()
    n_allocations = [len(device.owners) for device in devices]
    assert all(n > 40 for n in n_allocations)
    for which, n in enumerate(n_allocations):
        for fails_after in (0, 10, n // 2, n - 1):
            devices = [Watched(), Watched()]
            devices[which].fails_after = fails_after
            assert why_not(settings, [*devices]) == "out_of_memory"
            assert [device.n_held for device in devices] == [0, 0]


def test_a_pass_that_finds_no_memory_changes_nothing(model_path: ModelPath) -> None:
    """A second device without room for a pass's inputs refuses the batch; it is computed when there is room."""
    require("host")
    tokens = random_tokens(20, 1)
    devices = [Watched(), Watched()]
    engine = CudaEngine(settings_for(model_path(MOE)), devices=devices)
    engine.forward([Chunk(0, 0, tokens[:10], 0)])
    held = devices[0].n_held
    devices[1].fails_after = 0
    for _ in range(3):
        with pytest.raises(EngineError) as caught:
            engine.forward([Chunk(0, 10, tokens[10:13], 1)])
        assert caught.value.code == "out_of_memory"
        assert engine.length(0) == 10
        del caught
    # Groups of rows for this capacity stay; they are made once.
    assert devices[0].n_held <= held + 8
    devices[1].fails_after = None
    got = engine.forward([Chunk(0, 10, tokens[10:13], 1)]).dense(0).copy()
    engine.truncate(0, 0)
    assert_same_bits(got, engine.forward([Chunk(0, 0, tokens[:13], 1)]).dense(0))
    engine.close()


def test_a_closed_engine_gives_back_the_memory_of_every_device(model_path: ModelPath) -> None:
    """Of weights, caches, passes and compiled kernels."""
    require("host")
    devices = [Watched(), Watched(), Watched()]
    engine = CudaEngine(settings_for(model_path(MOE)), devices=devices)
    engine.forward([Chunk(0, 0, random_tokens(5, 1), 1)]).top(1)
    assert all(device.n_held > 20 and device._kernels for device in devices)
    engine.close()
    assert [device.n_held for device in devices] == [0, 0, 0]
    assert not any(device._kernels for device in devices)


# --- drafting ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(model_path: ModelPath) -> Iterator[list[CudaEngine]]:
    """Engines on one device and on two."""
    engines = [CudaEngine(settings_for(model_path(MOE)), devices=open_several("host", n)) for n in (1, 2)]
    yield engines
    for engine in engines:
        engine.close()


def test_a_draft_on_several_devices_goes_the_ordinary_way(pair: list[CudaEngine]) -> None:
    """It chooses no tokens itself, says so, and what is drafted with it is the same."""
    one, two = pair
    assert isinstance(two, Proposer)
    assert one.can_propose(GREEDY)
    assert not two.can_propose(GREEDY)
    with pytest.raises(EngineError, match="on one GPU") as caught:
        two.propose([Chunk(0, 0, random_tokens(5, 1), 1)], [GREEDY], 1)
    assert caught.value.code == "bad_params"
    drafted = []
    for engine, turns in ((one, 2), (two, 8)):
        drafter = ModelDrafter(engine, 64)
        session = DraftSession(OpenDraft(1, random_tokens(12, 1), GREEDY, (), 8), engine.info.n_ctx)
        assert drafter.open(session)
        for _ in range(turns):
            drafter.draft([session])
        drafted.append(session.prefix.tokens[12:])
    assert len(drafted[1]) == 8
    n = min(map(len, drafted))
    assert n >= 4
    assert drafted[0][:n] == drafted[1][:n]
