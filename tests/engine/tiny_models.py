"""Random models of a few hundred kilobytes, in any quant type that the kernels decode.

Blocks are random bytes under scales that make a matrix about N(0, 1 / fan_in), so that activations keep unit size
and every layer matters. Queries and logits are wider, so that attention and distributions have peaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from shared.kernels.weights import CODECS
from shared.quant.codecs import dequantize
from shared.quant.types import BY_NAME, QuantType
from tests.kernels.arrays import Array
from tests.kernels.blocks import SCALES, random_matrix

# The second scale of a block (of its minima) over the first, which centres the values.
_MINIMA = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}
_GAINS = {"token_embd": 10.0, "attn_q": 2.0, "output": 3.0}


@dataclass(frozen=True, slots=True)
class TinyModel:
    """What to write.

    quant: of every matrix that `types` does not name; types: by the tensor's name without block and ".weight".
    heads: of queries, of keys and values, elements of each.
    n_ff: of a dense model or of each expert. tied: no output matrix.
    rope_factors: write rope_freqs. rope_dim: rotated elements of a head; 0: all.
    twins: the second half of the output matrix repeats the first, so that all logits come in pairs.
    drop: a tensor to leave out. extra: one more, a vector of eight.
    """

    architecture: str = "qwen3moe"
    quant: str = "Q4_K"
    types: tuple[tuple[str, str], ...] = ()
    n_embd: int = 256
    n_layer: int = 2
    heads: tuple[int, int, int] = (4, 2, 64)
    n_ff: int = 256
    n_expert: int = 8
    n_expert_used: int = 2
    n_vocab: int = 300
    tied: bool = False
    rope_factors: bool = False
    rope_dim: int = 0
    twins: bool = False
    drop: str = ""
    extra: str = ""
    seed: int = 0

    def __str__(self) -> str:
        heads = "x".join(map(str, self.heads))
        parts = [self.architecture, self.quant, "mixed" if self.types else "", heads, str(self.n_embd)]
        parts += ["tied" if self.tied else "", "factors" if self.rope_factors else ""]
        return "-".join(filter(None, parts))


def scaled_matrix(quant: QuantType, n_rows: int, k: int, std: float, seed: int) -> Array:
    """Random rows with a standard deviation of `std`, or zeros of a type that has no codec: uint8 [n_rows, bytes]."""
    if quant.id not in CODECS:
        return np.zeros((n_rows, quant.bytes_per_row(k)), np.uint8)
    raw = random_matrix(quant, n_rows, k, seed)
    if quant.name in SCALES:
        blocks = raw.reshape(-1, quant.bytes_per_block)
        rng = np.random.default_rng([seed, n_rows, k, 1])
        # Sign and size of each block.
        base = rng.uniform(0.5, 1.5, len(blocks)) * rng.choice([-1.0, 1.0], len(blocks))

        def set_scales(factor: float) -> None:
            for i, at in enumerate(SCALES[quant.name]):
                values = base * factor * (_MINIMA[quant.name] if i else 1.0)
                blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)

        set_scales(2.0**-6)
        set_scales(2.0**-6 * std / float(dequantize(raw, quant, "x").std()))
    else:
        values = dequantize(raw, quant, "x") * np.float32(std)
        if quant.name == "BF16":
            raw = (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        else:
            raw = values.astype("<f4" if quant.name == "F32" else "<f2").view(np.uint8)
    return raw.reshape(n_rows, quant.bytes_per_row(k))


def write_tiny_model(path: Path, model: TinyModel) -> Path:
    """Write a model to `path`."""
    rng = np.random.default_rng([model.seed, 2])
    n_head, n_head_kv, head_dim = model.heads
    moe = model.architecture == "qwen3moe"
    writer = gguf.GGUFWriter(str(path), model.architecture)
    writer.add_context_length(1024)
    writer.add_embedding_length(model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    if model.rope_dim:
        writer.add_rope_dimension_count(model.rope_dim)
    if moe:
        writer.add_expert_count(model.n_expert)
        writer.add_expert_used_count(model.n_expert_used)
        writer.add_expert_feed_forward_length(model.n_ff)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(model.n_vocab)])

    def vector(name: str, *shape: int, mean: float = 1.0, std: float = 0.2) -> None:
        values = mean + std * rng.standard_normal(shape)
        if name == model.drop:
            return
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    def matrix(name: str, n_rows: int, k: int, *stack: int) -> None:
        kind = name.rsplit(".", 1)[-1]
        quant = BY_NAME[dict(model.types).get(kind, model.quant)]
        std = _GAINS.get(kind, 1.0) / np.sqrt(k)
        n = int(np.prod(stack, dtype=int))
        raw = scaled_matrix(quant, n * n_rows, k, std, int(rng.integers(1 << 31)))
        if kind == "output" and model.twins:
            raw[n_rows // 2 :] = raw[: n_rows // 2]
        if name == model.drop:
            return
        raw = raw.reshape(*stack, n_rows, quant.bytes_per_row(k))
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType(quant.id))

    matrix("token_embd", model.n_vocab, model.n_embd)
    vector("output_norm", model.n_embd)
    if not model.tied:
        matrix("output", model.n_vocab, model.n_embd)
    if model.rope_factors:
        writer.add_tensor("rope_freqs.weight", rng.uniform(1, 4, (model.rope_dim or head_dim) // 2).astype(np.float32))
    for layer in range(model.n_layer):
        block = f"blk.{layer}."
        vector(f"{block}attn_norm", model.n_embd)
        matrix(f"{block}attn_q", n_head * head_dim, model.n_embd)
        matrix(f"{block}attn_k", n_head_kv * head_dim, model.n_embd)
        matrix(f"{block}attn_v", n_head_kv * head_dim, model.n_embd)
        if model.architecture != "llama":
            vector(f"{block}attn_q_norm", head_dim)
            vector(f"{block}attn_k_norm", head_dim)
        matrix(f"{block}attn_output", model.n_embd, n_head * head_dim)
        vector(f"{block}ffn_norm", model.n_embd)
        if moe:
            vector(f"{block}ffn_gate_inp", model.n_expert, model.n_embd, mean=0.0, std=2 / np.sqrt(model.n_embd))
            matrix(f"{block}ffn_gate_exps", model.n_ff, model.n_embd, model.n_expert)
            matrix(f"{block}ffn_up_exps", model.n_ff, model.n_embd, model.n_expert)
            matrix(f"{block}ffn_down_exps", model.n_embd, model.n_ff, model.n_expert)
        else:
            matrix(f"{block}ffn_gate", model.n_ff, model.n_embd)
            matrix(f"{block}ffn_up", model.n_ff, model.n_embd)
            matrix(f"{block}ffn_down", model.n_embd, model.n_ff)
    if model.extra:
        writer.add_tensor(f"{model.extra}.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
