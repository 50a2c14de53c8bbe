"""Forward passes: which kernels run in which order, for how many rows, as captured graphs.

A pass has a capacity of rows (a power of two, or the largest batch) and of wanted rows; how many there are is read on
the device, so that one graph serves every batch that fits. Its arithmetic is the same for any capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.engine.cuda.inputs import Inputs, max_tiles
from shared.engine.cuda.weights import LayerWeights, Weights
from shared.engine.interface import Chunk, Float32, Int32
from shared.kernels import attention, experts, head, matmul, norm
from shared.kernels.activations import Activations
from shared.kernels.attention import PAGE_TOKENS, CacheLayout, KvLayer
from shared.kernels.device import Buffer, Device, Graph
from shared.kernels.experts import Groups
from shared.kernels.head import Chunks
from shared.kernels.weights import embed, embed_kernel
from shared.model.config import ModelConfig, RopeStyle
from shared.model.rope import rope_tables

_SPLIT_ROWS = 32
"""Up to so many rows, attention's splits are computed by blocks of their own."""
_SPLIT_BYTES = 256 << 20
"""Most memory for the splits' partial results; a batch that needs more takes the other way, with the same bits."""
_GATHER = 1024


def capacity(n: int, most: int) -> int:
    """The capacity of a pass of n rows: the next power of two, at most `most`."""
    return min(most, 1 << max(0, n - 1).bit_length())


@dataclass(frozen=True, slots=True)
class _Scratch:
    """What layers hand on to each other, for the largest batch; float32 unless said otherwise.

    x: [rows, embd] residual stream. h: [rows, embd] normalized. qkv: [rows, heads * head_dim]. q: halves [rows, n_head,
    head_dim]. mixed: [rows, n_head * head_dim] attention's output. projected: [rows, embd]. ff: [pairs, ff].
    y: [pairs, embd] the experts' outputs. scores: [rows, n_expert]. ids int32, shares: [rows, n_used] chosen experts.
    partials: attention's splits. *_q: quantized rows.
    """

    x: Buffer
    h: Buffer
    qkv: Buffer
    q: Buffer
    mixed: Buffer
    projected: Buffer
    ff: Buffer
    y: Buffer
    scores: Buffer | None
    ids: Buffer | None
    shares: Buffer | None
    partials: Buffer
    h_q: Activations
    mixed_q: Activations
    ff_q: Activations


class Passes:
    """See the module's docstring.

    Args:
        n_ctx: tokens of a slot. n_pages: of the KV pool. n_batch: most rows of a pass.
        graphs: whether passes are replayed as graphs.
    """

    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        weights: Weights,
        layout: CacheLayout,
        n_ctx: int,
        n_slots: int,
        n_pages: int,
        n_batch: int,
        graphs: bool,
    ) -> None:
        self.device = self._device = device
        self._config = config
        self._weights = weights
        self._layout = layout
        self._n_slots = n_slots
        self._n_batch = n_batch
        self.graphs = graphs
        self._group = config.n_head // config.n_head_kv
        self._max_pages = -(-n_ctx // attention.PAGE_TOKENS)
        cos, sin = rope_tables(config.rope, weights.rope_factors, n_ctx)
        cos, sin = rope_tables(config.rope, weights.rope_factors, n_ctx)
        self._cos, self._sin = self._upload(cos), self._upload(sin)
        self._pages = device.zeros((n_slots, -(-n_ctx // PAGE_TOKENS)), np.int32)
        # Zeros, since what is masked is multiplied with zero and must be finite.
        layer_bytes = n_pages * layout.page_bytes
        self._cache = device.zeros((config.n_layer * layer_bytes,), np.uint8)
        self._layers = [layout.layer(self._cache, layer * layer_bytes, n_pages) for layer in range(config.n_layer)]
        self._n_pages = n_pages
        tiles = max_tiles(min(n_batch, _SPLIT_ROWS), self._group, n_slots)
        item_bytes = attention.item_bytes(layout)
        self._max_items = max(1, min(tiles * attention.n_splits(n_ctx), _SPLIT_BYTES // item_bytes))
        self._pass_groups: dict[int, _PassGroups] = {}
        self._scratch = self._make_scratch()
        self._gather_ids = device.zeros((_GATHER,), np.int32)
        self._gathered = device.zeros((_GATHER,), np.float32)
        self._passes: dict[tuple[int, int, bool], Pass] = {}
        self._heads: dict[int, _Head] = {}

    @staticmethod
    def scratch_bytes(config: ModelConfig, n_batch: int) -> int:
        """Memory beside weights and KV pool, at most: scratch, partial results and the logits of one batch of rows
        to be verified."""
        pairs = n_batch * max(1, config.n_expert_used)
        heads = (config.n_head + 2 * config.n_head_kv) * config.head_dim
        n_ff = config.n_expert_ff or config.n_ff
        floats = n_batch * (4 * config.n_embd + 3 * heads + config.n_expert) + pairs * 2 * (n_ff + config.n_embd)
        return 4 * floats + _SPLIT_BYTES + 4 * 64 * config.n_vocab

    def prepare(self) -> None:
        """Compile every kernel that passes of this model use."""
        self._device.prepare(self._kernels())

    def write_pages(self, table: npt.NDArray[np.int32]) -> None:
        """Tell the device which pages slots have: [n_slots, max_pages]."""
        self._device.write(self._pages, table)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target) in every layer."""
        pairs = self._upload(np.array(copies, np.int32))
        attention.copy_pages(self._device, self._cache, self._layout, self._config.n_layer, self._n_pages, pairs)
        self._device.synchronize()

    def run(self, chunks: Sequence[Chunk]) -> Pass:
        """Start a pass over a batch that has been checked."""
        rows = capacity(sum(len(chunk.tokens) for chunk in chunks), self._n_batch)
        n_out = sum(chunk.rows for chunk in chunks)
        outs = capacity(n_out, self._n_batch) if n_out else 0
        # The last pass may still be reading its inputs.
        self._device.synchronize()
        split = rows <= _SPLIT_ROWS
        chosen = self._pass(rows, outs, split)
        n_items = chosen.inputs.fill(chunks, self._group)
        if split and n_items > self._max_items:
            chosen = self._pass(rows, outs, False)
            chosen.inputs.fill(chunks, self._group)
        chosen.start()
        return chosen

    def gather(self, logits: Buffer, row: int, ids: Int32) -> Float32:
        """Single logits of one row of a finished pass."""
        out = np.empty(len(ids), np.float32)
        for at in range(0, len(ids), _GATHER):
            part = np.ascontiguousarray(ids[at : at + _GATHER])
            targets = self._gather_ids.view(0, part.shape), self._gathered.view(0, part.shape)
            self._device.write(targets[0], part)
            head.gather_logits(self._device, logits, row, *targets)
            self._device.read(out[at : at + len(part)], targets[1])
        self._device.synchronize()
        return out

    def _pass(self, rows: int, outs: int, split: bool) -> Pass:
        key = rows, outs, split
        if key not in self._passes:
            tiles = max_tiles(rows, self._group, self._n_slots)
            inputs = Inputs(self._device, rows, outs, tiles, self._pages, self._scratch.q)
            if outs and outs not in self._heads:
                self._heads[outs] = _Head(self._device, self._config, outs)
            if rows not in self._pass_groups:
                self._pass_groups[rows] = self._make_groups(rows)
            self._passes[key] = Pass(self, inputs, rows, self._heads.get(outs), split)
        return self._passes[key]

    # --- what a pass consists of -------------------------------------------------------------------------------------

    def record(self, inputs: Inputs, rows: int, wanted: _Head | None, split: bool) -> None:
        """Ask the device for everything that a pass does: `rows` at most, attention in splits or whole."""
        device, weights, s = self._device, self._weights, self._scratch
        device.write(inputs.buffer, inputs.host)
        groups = self._pass_groups[rows]
        experts.dense_groups(device, inputs.step, 0, groups.dense)
        embed(device, inputs.step, inputs.tokens, weights.embedding, s.x.view(0, (rows, self._config.n_embd)))
        parts: _Parts = (None, None, 0)
        for layer, cache in zip(weights.layers, self._layers, strict=True):
            self._attention(inputs, rows, layer, cache, parts, groups.dense, split)
            parts = self._feed_forward(inputs, rows, layer, groups)
        if wanted is not None:
            self._logits(inputs, parts, wanted)

    def _attention(
        self,
        inputs: Inputs,
        rows: int,
        layer: LayerWeights,
        cache: KvLayer,
        parts: _Parts,
        dense: Groups,
        split: bool,
    ) -> None:
        """Add the last layer's outputs to the residual stream; project attention's output into `projected`."""
        device, config, s = self._device, self._config, self._scratch
        norm.add_norm(device, inputs.step, s.x, *parts, layer.attention_norm, config.rms_eps, s.h, s.h_q, rows)
        matmul.matmul(device, layer.qkv, dense, s.h_q, s.h, s.qkv)
        attention.rope_append(
            device,
            inputs.step,
            inputs.positions,
            inputs.slots,
            self._pages,
            s.qkv,
            layer.q_norm,
            layer.k_norm,
            config.rms_eps,
            self._cos,
            self._sin,
            config.rope.style is RopeStyle.NEOX,
            config.n_head,
            s.q,
            cache,
            rows,
        )
        if split:
            attention.attend_splits(device, inputs.query, cache, s.partials, self._max_items)
            attention.merge_splits(device, inputs.query, cache, s.partials, s.mixed, s.mixed_q, rows)
        else:
            attention.attend(device, inputs.query, cache, s.mixed)
            norm.quantize(device, inputs.step, 1, s.mixed, s.mixed_q, rows)
        matmul.matmul(device, [layer.output], dense, s.mixed_q, s.mixed, s.projected)

    def _feed_forward(self, inputs: Inputs, rows: int, layer: LayerWeights, groups: _PassGroups) -> _Parts:
        """Add attention's output to the residual stream; the parts that the feed-forward adds to it next."""
        device, config, s = self._device, self._config, self._scratch
        norm.add_norm(device, inputs.step, s.x, s.projected, None, 1, layer.ffn_norm, config.rms_eps, s.h, s.h_q, rows)
        n_used = config.n_expert_used
        chosen = groups.dense
        if layer.select is not None and s.scores is not None and s.ids is not None and s.shares is not None:
            experts.expert_scores(device, inputs.step, s.h, layer.select, s.scores, rows)
            chosen = groups.experts
            experts.select_experts(
                device, inputs.step, s.scores, config.norm_topk_prob, config.expert_scale, s.ids, s.shares, chosen, rows
            )
        matmul.gate_up(device, layer.gate, layer.up, chosen, s.h_q, s.h, s.ff, n_used=n_used)
        factor = max(1, n_used)
        norm.quantize(device, inputs.step, factor, s.ff, s.ff_q, rows * factor)
        matmul.matmul(device, [layer.down], chosen, s.ff_q, s.ff, s.y, n_used=n_used)
        return s.y, s.shares if n_used else None, factor

    def _logits(self, inputs: Inputs, parts: _Parts, wanted: _Head) -> None:
        """The wanted rows' logits, their leaders and log-sum-exp, copied out."""
        device, config, weights = self._device, self._config, self._weights
        experts.dense_groups(device, inputs.step, 1, wanted.groups)
        norm.output_norm(
            device,
            inputs.step,
            inputs.out_rows,
            self._scratch.x,
            *parts,
            weights.output_norm,
            config.rms_eps,
            wanted.h,
            wanted.h_q,
            wanted.outs,
        )
        matmul.matmul(device, [weights.output], wanted.groups, wanted.h_q, wanted.h, wanted.logits)
        head.top_chunks(device, inputs.step, wanted.logits, wanted.chunks, wanted.outs)
        head.top_merge(
            device,
            inputs.step,
            config.n_vocab,
            wanted.chunks,
            wanted.ids,
            wanted.values,
            wanted.log_sums,
            wanted.outs,
        )
        device.read(wanted.host_ids, wanted.ids)
        device.read(wanted.host_values, wanted.values)
        device.read(wanted.host_log_sums, wanted.log_sums)

    # --- memory -------------------------------------------------------------------------------------------------------

    def _make_groups(self, rows: int) -> _PassGroups:
        config, columns = self._config, matmul.columns_for(rows)
        dense = Groups.empty(self._device, rows, columns)
        if not config.n_expert:
            return _PassGroups(dense, dense)
        return _PassGroups(dense, Groups.empty(self._device, rows, columns, config.n_expert_used, config.n_expert))

    def _make_scratch(self) -> _Scratch:
        device, config, rows = self._device, self._config, self._n_batch
        heads = config.n_head * config.head_dim
        n_ff = config.n_expert_ff if config.n_expert else config.n_ff
        n_used, n_expert = config.n_expert_used, config.n_expert
        pairs = rows * max(1, n_used)

        def floats(*shape: int) -> Buffer:
            return device.empty(shape, np.float32)

        return _Scratch(
            x=floats(rows, config.n_embd),
            h=floats(rows, config.n_embd),
            qkv=floats(rows, heads + 2 * config.n_head_kv * config.head_dim),
            q=device.empty((rows, config.n_head, config.head_dim), np.uint16),
            mixed=floats(rows, heads),
            projected=floats(rows, config.n_embd),
            ff=floats(pairs, n_ff),
            y=floats(pairs, config.n_embd),
            scores=floats(rows, n_expert) if n_expert else None,
            ids=device.empty((rows, n_used), np.int32) if n_expert else None,
            shares=floats(rows, n_used) if n_expert else None,
            partials=floats(self._max_items * attention.item_bytes(self._layout) // 4),
            h_q=Activations.empty(device, rows, config.n_embd),
            mixed_q=Activations.empty(device, rows, heads),
            ff_q=Activations.empty(device, pairs, n_ff),
        )

    def _upload(self, array: npt.NDArray[np.generic]) -> Buffer:
        buffer = self._device.empty(array.shape, array.dtype)
        self._device.write(buffer, np.ascontiguousarray(array))
        return buffer

    def _kernels(self) -> list[tuple[str, str]]:
        """Every kernel that passes of this model use, as (file, name)."""
        config, weights = self._config, self._weights
        capacities = {capacity(rows, self._n_batch) for rows in range(1, self._n_batch + 1)}
        names = {("experts.cu", "dense_groups"), ("norm.cu", "quantize")}
        names |= {("norm.cu", norm.add_norm_name(config.n_embd)), ("norm.cu", norm.output_norm_name(config.n_embd))}
        names |= {("head.cu", "top_chunks"), ("head.cu", head.top_merge_name(config.n_vocab))}
        names.add(embed_kernel(weights.embedding.codec))
        names |= {("attention.cu", name) for name in attention.kernel_names(self._layout)}
        if config.n_expert:
            names |= {("experts.cu", name) for name in experts.select_experts_names(config.n_expert)}
            names |= {("experts.cu", experts.expert_scores_name(rows)) for rows in capacities}
        for n in {matmul.columns_for(rows) for rows in capacities}:
            for layer in weights.layers:
                names.add(("matmul.cu", matmul.gate_up_name(layer.gate, layer.up, n)))
                for matrices in (layer.qkv, [layer.output], [layer.down], [weights.output]):
                    names.add(("matmul.cu", matmul.matmul_name(matrices, n)))
        return sorted(names)


_Parts = tuple["Buffer | None", "Buffer | None", int]
"""What is still to be added to the residual stream: parts, their weights, and how many a row has."""


@dataclass(frozen=True, slots=True)
class _PassGroups:
    """The groups of plain matrices and of experts, for passes of one capacity."""

    dense: Groups
    experts: Groups


class _Head:
    """Room for the wanted rows' logits and what is copied out of them; `outs` rows."""

    def __init__(self, device: Device, config: ModelConfig, outs: int) -> None:
        self.outs = outs
        self.groups = Groups.empty(device, outs, matmul.columns_for(outs))
        self.h = device.empty((outs, config.n_embd), np.float32)
        self.h_q = Activations.empty(device, outs, config.n_embd)
        self.logits = device.empty((outs, config.n_vocab), np.float32)
        self.chunks = Chunks.empty(device, outs, config.n_vocab)
        self.ids = device.empty((outs, head.TOP), np.int32)
        self.values = device.empty((outs, head.TOP), np.float32)
        self.log_sums = device.empty((outs,), np.float64)
        self.host_ids: Int32 = device.staging(self.ids.shape, np.int32)
        self.host_values: Float32 = device.staging(self.values.shape, np.float32)
        self.host_log_sums: npt.NDArray[np.float64] = device.staging(self.log_sums.shape, np.float64)


class Pass:
    """One recorded pass and its results; what `CudaLogits` reads."""

    def __init__(self, passes: Passes, inputs: Inputs, rows: int, wanted: _Head | None, split: bool) -> None:
        self.inputs = inputs
        self._passes = passes
        self._rows = rows
        self._wanted = wanted
        self._split = split
        self._graph: Graph | None = None

    def start(self) -> None:
        """Compute what `inputs` describes, without waiting for it."""
        device = self._passes.device
        if not self._passes.graphs:
            self._record()
            return
        if self._graph is None:
            self._graph = device.capture(self._record)
        self._graph.replay()

    def leaders(self) -> tuple[Int32, Float32, npt.NDArray[np.float64]]:
        self._passes.device.synchronize()
        if self._wanted is None:
            return np.empty((0, head.TOP), np.int32), np.empty((0, head.TOP), np.float32), np.empty(0, np.float64)
        return self._wanted.host_ids, self._wanted.host_values, self._wanted.host_log_sums

    def gather(self, row: int, ids: Int32) -> Float32:
        assert self._wanted is not None
        return self._passes.gather(self._wanted.logits, row, ids)

    def dense(self, row: int) -> Float32:
        assert self._wanted is not None
        logits = self._wanted.logits
        out = np.empty(logits.shape[1], np.float32)
        self._passes.device.read(out, logits.view(row * out.nbytes, out.shape))
        self._passes.device.synchronize()
        return out

    def _record(self) -> None:
        self._passes.record(self.inputs, self._rows, self._wanted, self._split)
