"""Forward passes: which kernels run in which order, for how many rows, as captured graphs.

A pass has a capacity of rows (a power of two, or the largest batch) and of wanted rows; how many there are is read on
the device, so that one graph serves every batch that fits. Its arithmetic is the same for any capacity.

Each device is a stage of the pass, with its own graph; from one to the next only the residual stream is handed over.
The bits are those of one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shared.engine.cuda.inputs import Inputs, max_tiles
from shared.engine.cuda.weights import LayerWeights, OutputWeights, Weights
from shared.engine.interface import Chunk, Float32, Int32, Proposed
from shared.kernels import attention, experts, head, matmul, norm
from shared.kernels.activations import Activations
from shared.kernels.attention import PAGE_TOKENS, CacheLayout, KvLayer
from shared.kernels.choose import CHOICE, choose
from shared.kernels.choose import KERNEL as CHOOSE_KERNEL
from shared.kernels.device import Buffer, Device, Graph
from shared.kernels.experts import Groups, Handover
from shared.kernels.head import Chunks
from shared.kernels.matmul import ExpertRows, PlainRows
from shared.kernels.weights import Tiles, embed, embed_kernel
from shared.model.config import ModelConfig, RopeStyle
from shared.model.rope import rope_tables
from shared.sampling.params import SamplingParams

_SPLIT_ROWS = 32
"""Up to so many rows, attention's splits are computed by blocks of their own."""
_SPLIT_BYTES = 256 << 20
"""Most memory for the splits' partial results; a batch that needs more takes the other way, with the same bits."""
_WANTED = 64
"""Wanted rows of a pass that memory is counted for when a model is loaded: more are seldom asked for."""
_GATHER = 1024
PageNumbers = npt.NDArray[np.int32]
"""A page table: [n_slots, max_pages]."""
_MOST_NUMBER = 2**31 - 1
MAX_CHAIN = 16
"""Most passes of a chain."""


def capacity(n: int, most: int) -> int:
    """The capacity of a pass of n rows: the next power of two, at most `most`."""
    return min(most, 1 << max(0, n - 1).bit_length())


@dataclass(frozen=True, slots=True)
class _Scratch:
    """What layers hand on to each other, for the largest batch; float32 unless said otherwise.

    x, spare: [rows, embd] residual stream. h: [rows, embd] normalized. qkv: [rows, heads * head_dim]. q: halves
    [rows, n_head, head_dim]. mixed: [rows, n_head * head_dim] attention's output. projected: [rows, embd].
    ff: [pairs, ff]. y: [pairs, embd] the feed-forward's outputs. partials: attention's splits. *_q: quantized rows.
    """

    x: Buffer
    spare: Buffer
    h: Buffer
    qkv: Buffer
    q: Buffer
    mixed: Buffer
    projected: Buffer
    ff: Buffer
    y: Buffer
    experts: _Chosen | None
    partials: Buffer
    h_q: Activations
    mixed_q: Activations
    ff_q: Activations


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Expert selection: scores [rows, n_expert]; ids int32 and shares [rows, n_used] of the chosen ones."""

    scores: Buffer
    ids: Buffer
    shares: Buffer
    handover: Handover


class Passes:
    """See the module's docstring.

    Args:
        devices: in the order of their layers. weights: what each of them has.
        n_ctx: tokens of a slot. n_pages: of the KV pool. n_batch: most rows of a pass.
        graphs: whether passes are replayed as graphs.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        config: ModelConfig,
        weights: Sequence[Weights],
        layout: CacheLayout,
        n_ctx: int,
        n_slots: int,
        n_pages: int,
        n_batch: int,
        graphs: bool,
    ) -> None:
        self._config = config
        self._n_slots = n_slots
        self._n_batch = n_batch
        self.graphs = graphs
        self._stages = [
            Stage(device, config, part, layout, n_ctx, n_slots, n_pages, n_batch)
            for device, part in zip(devices, weights, strict=True)
        ]
        # Where logits are.
        self.device = devices[-1]
        self._gather_ids = self.device.zeros((_GATHER,), np.int32)
        self._gathered = self.device.zeros((_GATHER,), np.float32)
        self._passes: dict[tuple[int, int, bool, bool], Pass] = {}
        self._chains: dict[int, _Chain] = {}
        self._number = 0
        # Whether all that passes were asked for is known to be done.
        self._idle = True
        self._heads: dict[int, _Head] = {}

    @staticmethod
    def scratch_bytes(config: ModelConfig, n_ctx: int, n_batch: int) -> int:
        """About the memory of a device beside weights and KV pool, while at most _WANTED rows of a pass are wanted:
        scratch, partial results, rope tables and logits."""
        pairs = n_batch * max(1, config.n_expert_used)
        heads = (config.n_head + 2 * config.n_head_kv) * config.head_dim
        n_ff = config.n_expert_ff or config.n_ff
        floats = n_batch * (4 * config.n_embd + 3 * heads + config.n_expert) + pairs * 2 * (n_ff + config.n_embd)
        # Each capacity of wanted rows has its own, in sum less than twice the largest.
        return 4 * (floats + n_ctx * config.rope.dim + 2 * _WANTED * config.n_vocab) + _SPLIT_BYTES

    def prepare(self) -> None:
        """Compile every kernel that passes of this model use."""
        # All of them for each device, which makes them the same modules: compiled once.
        kernels = sorted(set().union(*(stage.kernels() for stage in self._stages)))
        for stage in self._stages:
            stage.device.prepare(kernels)

    def close(self) -> None:
        """Let go of the recorded passes, which know this object: with it all memory goes."""
        try:
            self.wait()
        finally:
            self._passes.clear()

    def write_pages(self, table: PageNumbers) -> None:
        """Tell the devices which pages slots have: [n_slots, max_pages]."""
        for stage in self._stages:
            stage.write_pages(table)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target) in every layer."""
        for stage in self._stages:
            stage.copy_pages(copies)

    def run(self, chunks: Sequence[Chunk], pages: PageNumbers) -> Pass:
        """Start a pass over a batch that has been checked, with the page table that has room for it."""
        # The last pass may still be reading its inputs.
        self.wait()
        chosen = self._fill(chunks, pages, False)
        self._idle = False
        chosen.start()
        return chosen

    def propose(
        self, chunks: Sequence[Chunk], pages: PageNumbers, params: Sequence[SamplingParams], n: int
    ) -> Proposed:
        """A chain of passes, whose first is over a batch that has been checked and wants a row of each chunk.

        On one device only: what is chosen at a pass's end is embedded at the next one's start.
        """
        self.wait()
        self._idle = False
        chain = self._chain(capacity(len(chunks), self._n_slots))
        for row, (chunk, p) in enumerate(zip(chunks, params, strict=True)):
            position = chunk.start + len(chunk.tokens)
            chain.host_choices[row] = (p.seed, p.temperature, p.top_p, p.min_p, p.top_k, position)
        self.device.write(chain.choices, chain.host_choices)
        for i in range(n):
            chosen = self._fill(chunks, pages, True)
            chosen.inputs.host[4] = i
            chain.start(i, chosen)
            fed = np.full(1, -1, np.int32)
            chunks = [Chunk(chunk.slot, chunk.start + len(chunk.tokens), fed, 1) for chunk in chunks]
        self.device.read(chain.host_history, chain.history)
        self.device.read(chain.host_confidences, chain.confidences)
        self.wait()
        rows = len(chunks)
        return Proposed(chain.host_history[:n, :rows].T.copy(), chain.host_confidences[:n, :rows].T.copy())

    def gather(self, logits: Buffer, row: int, ids: Int32) -> Float32:
        """Single logits of one row of a finished pass."""
        out = np.empty(len(ids), np.float32)
        for at in range(0, len(ids), _GATHER):
            part = np.ascontiguousarray(ids[at : at + _GATHER])
            targets = self._gather_ids.view(0, part.shape), self._gathered.view(0, part.shape)
            self.device.write(targets[0], part)
            head.gather_logits(self.device, logits, row, *targets)
            self.device.read(out[at : at + len(part)], targets[1])
        self.device.synchronize()
        return out

    def _fill(self, chunks: Sequence[Chunk], pages: PageNumbers, chained: bool) -> Pass:
        """The pass that a batch takes, with its inputs filled."""
        rows = capacity(sum(len(chunk.tokens) for chunk in chunks), self._n_batch)
        n_out = sum(chunk.rows for chunk in chunks)
        outs = capacity(n_out, self._n_slots if chained else self._n_batch) if n_out else 0
        chosen = self._pass(rows, outs, rows <= _SPLIT_ROWS, chained)
        number = self._next_number()
        if not chosen.fill(chunks, pages, number):
            chosen = self._pass(rows, outs, False, chained)
            chosen.fill(chunks, pages, number)
        return chosen

    def _next_number(self) -> int:
        """The next pass's number, which no groups of experts in memory have."""
        if self._number == _MOST_NUMBER:
            for stage in self._stages:
                stage.forget_groups()
            self._number = 0
        self._number += 1
        return self._number

    def _pass(self, rows: int, outs: int, split: bool, chained: bool) -> Pass:
        key = rows, outs, split, chained
        if key not in self._passes:
            inputs = [stage.make_inputs(rows, outs, split) for stage in self._stages]
            if outs and outs not in self._heads:
                self._heads[outs] = _Head(self.device, self._config, outs)
            chain = self._chain(outs) if chained else None
            wanted = self._heads.get(outs)
            parts = [
                _Part(stage, told, rows, wanted, split, chain, self.graphs)
                for stage, told in zip(self._stages, inputs, strict=True)
            ]
            self._passes[key] = Pass(self, parts, wanted)
        return self._passes[key]

    def _chain(self, rows: int) -> _Chain:
        if rows not in self._chains:
            self._chains[rows] = _Chain(self.device, rows)
        return self._chains[rows]

    def wait(self) -> None:
        """Until all passes are done."""
        if self._idle:
            return
        for stage in self._stages:
            stage.device.synchronize()
        self._idle = True


class Stage:
    """A device's part of every pass: consecutive layers with their KV pool; on the first device the embedding before
    them, on the last one the logits behind them. See `Passes` for the arguments."""

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
    ) -> None:
        self.device = device
        self._config = config
        self._weights = weights
        self._layout = layout
        self._n_batch = n_batch
        self._group = config.n_head // config.n_head_kv
        cos, sin = rope_tables(config.rope, weights.rope_factors, n_ctx)
        self._cos, self._sin = self._upload(cos), self._upload(sin)
        self._pages = device.zeros((n_slots, -(-n_ctx // PAGE_TOKENS)), np.int32)
        layer_bytes, n_layers = n_pages * layout.page_bytes, len(weights.layers)
        self._cache = device.zeros((n_layers * layer_bytes,), np.uint8)
        self._layers = [layout.layer(self._cache, layer * layer_bytes, n_pages) for layer in range(n_layers)]
        self._n_pages = n_pages
        tiles = max_tiles(min(n_batch, _SPLIT_ROWS), self._group, n_slots)
        item_bytes = attention.item_bytes(layout)
        self._max_items = max(1, min(tiles * attention.n_splits(n_ctx), _SPLIT_BYTES // item_bytes))
        self._groups: dict[int, Groups] = {}
        self._scratch = self._make_scratch()
        # A batch has a chunk of a slot at most, which writes into one shared page at most.
        self._copies = device.zeros((n_slots, 2), np.int32)
        self._fed = device.zeros((n_slots,), np.int32)

    @property
    def x(self) -> Buffer:
        """Where the residual stream comes in, on all devices but the first: float32 [n_batch, n_embd]."""
        return self._scratch.x

    def make_inputs(self, rows: int, outs: int, split: bool) -> Inputs:
        """Room for what passes of this capacity are told, and for their groups of rows."""
        if rows not in self._groups and self._config.n_expert:
            self._groups[rows] = self._make_groups(rows)
        max_items = self._max_items if split else 0
        return Inputs(self.device, rows, outs, self._group, max_items, self._pages, self._scratch.q)

    def forget_groups(self) -> None:
        """Leave no group of experts in memory that a pass could take for its own."""
        for groups in self._groups.values():
            self.device.fill(groups.words, 0)

    def write_pages(self, table: PageNumbers) -> None:
        self.device.write(self._pages, table)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        pairs = self._copies.view(0, (len(copies), 2))
        self.device.write(pairs, np.array(copies, np.int32))
        attention.copy_pages(self.device, self._cache, self._layout, len(self._layers), self._n_pages, pairs)
        self.device.synchronize()

    # --- what a pass consists of -------------------------------------------------------------------------------------

    def record(self, inputs: Inputs, rows: int, wanted: _Head | None, split: bool, chain: _Chain | None) -> Buffer:
        """Ask the device for all of its part of a pass: `rows` at most, attention in splits or whole.

        In a chain, inputs are copied in before the pass, and what comes out is the next tokens.

        Returns:
            Where the residual stream is afterwards, for the next device: float32, its rows the first ones.
        """
        device, weights, s = self.device, self._weights, self._scratch
        if chain is None:
            device.write(inputs.buffer, inputs.host)
        plain = PlainRows(inputs.step.view(0, (1,)), rows)
        if weights.embedding is not None:
            x = s.x.view(0, (rows, self._config.n_embd))
            embed(device, inputs.step, inputs.tokens, self._fed, weights.embedding, x)
        stream = _Stream(s.x, s.spare, (None, None, 0))
        for number, (layer, cache) in enumerate(zip(weights.layers, self._layers, strict=True)):
            self._attention(inputs, rows, layer, cache, stream, plain, split)
            stream = self._feed_forward(inputs, rows, number, layer, stream, plain)
        if weights.output is None:
            self._add_due(inputs, rows, stream)
        elif wanted is not None:
            self._logits(inputs, stream, wanted, weights.output, chain)
        return stream.x

    def _attention(
        self,
        inputs: Inputs,
        rows: int,
        layer: LayerWeights,
        cache: KvLayer,
        stream: _Stream,
        plain: PlainRows,
        split: bool,
    ) -> None:
        """Add what is due to the residual stream; project attention's output into `projected`."""
        device, config, s = self.device, self._config, self._scratch
        norm.add_norm(
            device, inputs.step, stream.x, *stream.parts, layer.attention_norm, config.rms_eps, s.h, s.h_q, rows
        )
        matmul.matmul(device, layer.qkv, plain, s.h_q, s.h, s.qkv)
        attention.rope_append(
            device,
            inputs.step,
            inputs.positions,
            inputs.cells,
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
            attention.attend_splits(device, inputs.query, cache, s.partials)
            attention.merge_splits(device, inputs.query, cache, s.partials, s.mixed, s.mixed_q, rows)
        else:
            attention.attend(device, inputs.query, cache, s.mixed)
            norm.quantize(device, inputs.step, 1, s.mixed, s.mixed_q, rows)
        matmul.matmul(device, [layer.output], plain, s.mixed_q, s.mixed, s.projected)

    def _feed_forward(
        self, inputs: Inputs, rows: int, number: int, layer: LayerWeights, stream: _Stream, plain: PlainRows
    ) -> _Stream:
        """Add attention's output to the residual stream; what the feed-forward adds to it is due next."""
        device, config, s, eps = self.device, self._config, self._scratch, self._config.rms_eps
        if layer.select is None or s.experts is None:
            norm.add_norm(device, inputs.step, stream.x, s.projected, None, 1, layer.ffn_norm, eps, s.h, s.h_q, rows)
            matmul.gate_up(device, layer.gate, layer.up, plain, s.h_q, s.h, s.ff)
            self._down(inputs, layer.down, plain, rows, 0)
            return replace(stream, parts=(s.y, None, 1))
        chosen, n_used = s.experts, config.n_expert_used
        groups = replace(self._groups[rows], layer=number)
        pairs = ExpertRows(groups, inputs.step.view(12, (1,)))
        if rows <= experts.FEW_ROWS:
            experts.norm_scores_select(
                device,
                inputs.step,
                stream.x,
                stream.spare,
                s.projected,
                layer.ffn_norm,
                eps,
                s.h,
                s.h_q,
                layer.select,
                config.norm_topk_prob,
                config.expert_scale,
                chosen.handover,
                chosen.ids,
                chosen.shares,
                groups,
                rows,
            )
            stream = _Stream(stream.spare, stream.x, stream.parts)
        else:
            norm.add_norm(device, inputs.step, stream.x, s.projected, None, 1, layer.ffn_norm, eps, s.h, s.h_q, rows)
            experts.expert_scores(device, inputs.step, s.h, layer.select, chosen.scores, rows)
            experts.select_experts(
                device,
                inputs.step,
                chosen.scores,
                config.norm_topk_prob,
                config.expert_scale,
                chosen.ids,
                chosen.shares,
                groups,
                rows,
            )
        matmul.gate_up(device, layer.gate, layer.up, pairs, s.h_q, s.h, s.ff, n_used=n_used)
        self._down(inputs, layer.down, pairs, rows, n_used)
        return replace(stream, parts=(s.y, chosen.shares, n_used))

    def _down(self, inputs: Inputs, down: Tiles, rows: ExpertRows | PlainRows, max_rows: int, n_used: int) -> None:
        """The feed-forward's outputs of its inner rows."""
        device, s = self.device, self._scratch
        quantized = None
        if not matmul.can_quantize(down, rows.rows_per_group):
            quantized, pairs = s.ff_q, max(1, n_used)
            norm.quantize(device, inputs.step, pairs, s.ff, s.ff_q, max_rows * pairs)
        matmul.matmul(device, [down], rows, quantized, s.ff, s.y, n_used=n_used)

    def _add_due(self, inputs: Inputs, rows: int, stream: _Stream) -> None:
        """Add what is due to the residual stream, as the first norm of the next layer would: with the same bits."""
        s, eps = self._scratch, self._config.rms_eps
        # Of the norm nothing is used, so that any weights will do.
        weight = self._weights.layers[-1].ffn_norm
        norm.add_norm(self.device, inputs.step, stream.x, *stream.parts, weight, eps, None, s.h_q, rows)

    def _logits(
        self, inputs: Inputs, stream: _Stream, wanted: _Head, output: OutputWeights, chain: _Chain | None
    ) -> None:
        """The wanted rows' logits, their leaders and log-sum-exp, copied out; or the next tokens of a chain."""
        device, config = self.device, self._config
        plain = PlainRows(inputs.step.view(4, (1,)), wanted.outs)
        norm.output_norm(
            device,
            inputs.step,
            inputs.out_rows,
            stream.x,
            *stream.parts,
            output.norm,
            config.rms_eps,
            wanted.h,
            wanted.h_q,
            wanted.outs,
        )
        matmul.matmul(device, [output.matrix], plain, wanted.h_q, wanted.h, wanted.logits)
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
        if chain is not None:
            choose(
                device,
                inputs.step,
                chain.choices,
                wanted.ids,
                wanted.values,
                wanted.log_sums,
                self._fed,
                chain.history,
                chain.confidences,
            )
            return
        device.read(wanted.host_ids, wanted.ids)
        device.read(wanted.host_values, wanted.values)
        device.read(wanted.host_log_sums, wanted.log_sums)

    # --- memory -------------------------------------------------------------------------------------------------------

    def _make_groups(self, rows: int) -> Groups:
        config = self._config
        columns, n_used = matmul.columns_for(rows), config.n_expert_used
        return Groups.empty(self.device, rows, columns, n_used, config.n_expert, len(self._layers))

    def _make_scratch(self) -> _Scratch:
        device, config, rows = self.device, self._config, self._n_batch
        heads = config.n_head * config.head_dim
        n_ff = config.n_expert_ff if config.n_expert else config.n_ff
        n_used, n_expert = config.n_expert_used, config.n_expert
        pairs = rows * max(1, n_used)

        def floats(*shape: int) -> Buffer:
            return device.empty(shape, np.float32)

        chosen = None
        if n_expert:
            ids = device.empty((rows, n_used), np.int32)
            handover = Handover.empty(device, rows, n_expert)
            chosen = _Chosen(floats(rows, n_expert), ids, floats(rows, n_used), handover)
        return _Scratch(
            x=floats(rows, config.n_embd),
            spare=floats(rows, config.n_embd),
            h=floats(rows, config.n_embd),
            qkv=floats(rows, heads + 2 * config.n_head_kv * config.head_dim),
            q=device.empty((rows, config.n_head, config.head_dim), np.uint16),
            mixed=floats(rows, heads),
            projected=floats(rows, config.n_embd),
            ff=floats(pairs, n_ff),
            y=floats(pairs, config.n_embd),
            experts=chosen,
            partials=floats(self._max_items * attention.item_bytes(self._layout) // 4),
            h_q=Activations.empty(device, rows, config.n_embd),
            mixed_q=Activations.empty(device, rows, heads),
            ff_q=Activations.empty(device, pairs, n_ff),
        )

    def _upload(self, array: npt.NDArray[np.generic]) -> Buffer:
        buffer = self.device.empty(array.shape, array.dtype)
        self.device.write(buffer, np.ascontiguousarray(array))
        return buffer

    def kernels(self) -> set[tuple[str, str]]:
        """Every kernel that this device's part of passes uses, as (file, name)."""
        config, weights = self._config, self._weights
        capacities = {capacity(rows, self._n_batch) for rows in range(1, self._n_batch + 1)}
        names = {CHOOSE_KERNEL, ("norm.cu", "quantize")}
        names |= {("norm.cu", norm.add_norm_name(config.n_embd)), ("norm.cu", norm.output_norm_name(config.n_embd))}
        names |= {
            ("head.cu", "gather_logits"),
            ("head.cu", "top_chunks"),
            ("head.cu", head.top_merge_name(config.n_vocab)),
        }
        if weights.embedding is not None:
            names.add(embed_kernel(weights.embedding.codec))
        names |= {("attention.cu", name) for name in attention.kernel_names(self._layout)}
        if config.n_expert:
            for rows in capacities:
                if rows <= experts.FEW_ROWS:
                    name = experts.norm_scores_select_name(config.n_embd, config.n_expert, rows)
                    names.add(("experts.cu", name))
                else:
                    _, *many_rows = experts.select_experts_names(config.n_expert)
                    names |= {("experts.cu", name) for name in (experts.expert_scores_name(rows), *many_rows)}
        for n in {matmul.columns_for(rows) for rows in capacities}:
            for layer in weights.layers:
                names.add(("matmul.cu", matmul.gate_up_name(layer.gate, layer.up, n)))
                for matrices in (layer.qkv, [layer.output]):
                    names.add(("matmul.cu", matmul.matmul_name(matrices, n)))
                quantize = matmul.can_quantize(layer.down, n)
                names.add(("matmul.cu", matmul.matmul_name([layer.down], n, quantize)))
            if weights.output is not None:
                names.add(("matmul.cu", matmul.matmul_name([weights.output.matrix], n)))
        return names


@dataclass(frozen=True, slots=True)
class _Stream:
    """The residual stream: [rows, embd] float32, another buffer like it, and what is due to be added: parts, their
    weights, and how many a row has."""

    x: Buffer
    spare: Buffer
    parts: tuple[Buffer | None, Buffer | None, int]


class _Head:
    """Room for the wanted rows' logits and what is copied out of them; `outs` rows."""

    def __init__(self, device: Device, config: ModelConfig, outs: int) -> None:
        self.outs = outs
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


class _Chain:
    """Room for a chain of up to MAX_CHAIN passes with `rows` wanted rows: requests, what was chosen, and the passes'
    inputs, which must stay as they are until the device has read them."""

    def __init__(self, device: Device, rows: int) -> None:
        self._device = device
        self._inputs: dict[int, npt.NDArray[np.int32]] = {}
        self.host_choices = device.staging((rows,), CHOICE)
        self.choices = device.zeros((rows,), CHOICE)
        self.history = device.zeros((MAX_CHAIN, rows), np.int32)
        self.confidences = device.zeros((MAX_CHAIN, rows), np.float32)
        self.host_history: Int32 = device.staging(self.history.shape, np.int32)
        self.host_confidences: Float32 = device.staging(self.confidences.shape, np.float32)

    def start(self, i: int, chosen: Pass) -> None:
        """Start the pass that is number `i` of the chain."""
        host = chosen.inputs.host
        kept = self._inputs.get(i)
        if kept is None or len(kept) < len(host):
            kept = self._inputs[i] = self._device.staging(host.shape, np.int32)
        kept[: len(host)] = host
        self._device.write(chosen.inputs.buffer, kept[: len(host)])
        chosen.start()


class _Part:
    """A stage's part of a pass, recorded when it is first asked for."""

    def __init__(
        self,
        stage: Stage,
        inputs: Inputs,
        rows: int,
        wanted: _Head | None,
        split: bool,
        chain: _Chain | None,
        graphs: bool,
    ) -> None:
        self.inputs = inputs
        self._stage = stage
        self._rows = rows
        self._wanted = wanted
        self._split = split
        self._chain = chain
        self._graphs = graphs
        self._graph: Graph | None = None
        # Where the residual stream is at the end; known once it is recorded.
        self._x = stage.x

    def start(self) -> None:
        """Compute what `inputs` describes, without waiting for it."""
        if not self._graphs:
            self._record()
            return
        if self._graph is None:
            self._graph = self._stage.device.capture(self._record)
        self._graph.replay()

    def hand_over(self, rows: int, to: _Part) -> None:
        """Give the next stage the residual stream of the first `rows` rows."""
        shape = rows, self._x.shape[1]
        self._stage.device.copy_to(to._stage.device, to._stage.x.view(0, shape), self._x.view(0, shape))

    def _record(self) -> None:
        self._x = self._stage.record(self.inputs, self._rows, self._wanted, self._split, self._chain)


class Pass:
    """One pass, stage by stage, and its results; what `CudaLogits` reads."""

    def __init__(self, passes: Passes, parts: Sequence[_Part], wanted: _Head | None) -> None:
        self._passes = passes
        self._parts = parts
        self._wanted = wanted

    @property
    def inputs(self) -> Inputs:
        """What the first stage is told, as all are."""
        return self._parts[0].inputs

    def fill(self, chunks: Sequence[Chunk], pages: PageNumbers, number: int) -> bool:
        """As `Inputs.fill`, for every stage."""
        filled = self.inputs.fill(chunks, pages, number)
        for part in self._parts[1:]:
            part.inputs.host[:] = self.inputs.host
        return filled

    def start(self) -> None:
        """Compute what `inputs` describes, without waiting for it."""
        rows = self.inputs.n_rows
        for i, part in enumerate(self._parts):
            if i > 0:
                self._parts[i - 1].hand_over(rows, part)
            part.start()

    def leaders(self) -> tuple[Int32, Float32, npt.NDArray[np.float64]]:
        self._passes.wait()
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
