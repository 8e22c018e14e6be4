"""The kind `nsa`: Native Sparse Attention (arXiv:2502.11089)."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from nsa_kernels import CompressionWeights, NSAConfig, NSAOutput, native_sparse_attention
from nsa_kernels.decode.attention import (
    LayerCache,
    NewToken,
    StartedBlocks,
    chunk_attention,
    decode_attention,
)
from nsa_kernels.decode.eager import started_blocks
from nsa_kernels.eager.compress import summarise
from nsa_kernels.elementwise import rotate
from nsa_kernels.errors import SettingError
from nsa_kernels.packing import BatchLayout, batch_layout, compressed_block_centres
from torch import Tensor, nn

from nsa_lightning.model.attention.base import (
    Attended,
    CacheRoom,
    Chunk,
    FirstValues,
    Lengths,
    PackedContext,
    Rotary,
    Step,
    TokenSlots,
)
from nsa_lightning.model.attention.block_summary import BlockSummary
from nsa_lightning.model.attention.pairs import compressed_pairs, num_summaries, selected_pairs, window_pairs
from nsa_lightning.model.attention.projections import GroupedQueryAttention, KeyValue
from nsa_lightning.model.config import AttentionKind, NSALayerConfig, TransformerConfig
from nsa_lightning.model.context_parallel import ContextParallel
from nsa_lightning.model.statistics import branch_statistics

# T packed or new tokens, B sequences, H query heads, H_kv KV heads, D_qk and D_v head dims, C rows of compressed
# blocks, l tokens in a compression block, d its stride.


class NSAContext(NamedTuple):
    """What NSA layers need to know of a packed batch."""

    batch: PackedContext
    compressed_rotary: Rotary | None  # of the centres of compression blocks, [C, R/2]; None: summaries are not rotated
    layout: BatchLayout | None  # where documents and blocks lie, for the kernels


class NSAChunk(NamedTuple):
    """Where new tokens of one sequence stand, and the compression blocks that they complete."""

    tokens: Chunk
    blocks: range
    block_rotary: Rotary | None  # of the blocks' centres; None: summaries are not rotated


class NSACache(NamedTuple):
    """What an NSA layer keeps."""

    branches: tuple[TokenSlots, ...]  # rotated keys: of the selected branch, and of the sliding one if it has its own
    pending: TokenSlots  # the last l tokens that the compressed branch has yet to summarise
    summaries: TokenSlots  # compression block i in slot i
    started: StartedBlocks

    def tensors(self) -> Iterator[Tensor]:
        """Keys, values, summaries and sums."""
        for slots in (*self.branches, self.pending, self.summaries, self.started):
            yield from slots

    def operands(self) -> LayerCache:
        """The same as `decode_attention` takes it."""
        return LayerCache(*self.branches[0], *self.branches[-1], *self.summaries)


class Projected(NamedTuple):
    """What tokens attend with and are attended by."""

    q: Tensor  # rotated, [T, H, D_qk]
    gates: Tensor  # [T, H, 3]
    branches: tuple[tuple[Tensor, Tensor], ...]  # rotated keys and values of the branches, as in `NSACache`
    compressed: tuple[Tensor, Tensor]  # keys and values to summarise; the values are the selected branch's if it shares

    @property
    def own(self) -> bool:
        """Whether every branch has keys and values of its own."""
        return len(self.branches) > 1

    def to_heads(self, parallel: ContextParallel) -> "Projected":
        """The same of all tokens and a part of the heads, where ranks share the batch."""
        pairs = [x for pair in self.branches for x in pair]
        q, gates, *pairs = parallel.to_heads(self.q, self.gates, *pairs, *self.compressed[: 1 + self.own])
        if not self.own:
            pairs.append(pairs[1])
        *branches, compressed = zip(pairs[::2], pairs[1::2], strict=True)
        return Projected(q, gates, tuple(branches), compressed)


class NSAttention(GroupedQueryAttention):
    """Compressed, selected and sliding branch, summed by learned gates.

    The inherited `k_proj` and `v_proj` serve the selected branch, and with `kv_sharing: shared` all of them.
    """

    def __init__(self, config: TransformerConfig) -> None:
        shape, nsa = config.layer_shape, config.nsa
        super().__init__(shape)
        self.config = nsa
        separate = nsa.kv_sharing == "separate"
        self.compressed = KeyValue(shape) if separate else None
        self.sliding = KeyValue(shape) if separate else None
        learned = nsa.compression != "mean"
        self.k_summary = BlockSummary(shape.num_kv_heads, shape.head_dim, nsa) if learned else None
        self.v_summary = BlockSummary(shape.num_kv_heads, shape.value_head_dim, nsa) if learned else None
        gate_inputs = nsa.gate_hidden_size or shape.hidden_size
        self.branch_gate = nn.Linear(gate_inputs, 3 * shape.num_heads)
        self.branch_gate_hidden = (
            nn.Sequential(nn.Linear(shape.hidden_size, gate_inputs), nn.SiLU())
            if nsa.gate_hidden_size
            else nn.Identity()
        )

    def maps(self) -> list[nn.Linear]:
        """Also to keys and values of branches that have their own, and to the gates where one map gives them."""
        maps = super().maps()
        for branch in (self.sliding, self.compressed):
            maps += [branch.k_proj, branch.v_proj] if branch is not None else []
        return maps + ([self.branch_gate] if isinstance(self.branch_gate_hidden, nn.Identity) else [])

    def gates(self, x: Tensor) -> Tensor:
        """Weight of each branch, [T, H, 3] in (0, 1): compressed, selected, sliding."""
        return self._gate_logits(x).unflatten(-1, (self.num_heads, 3)).sigmoid()

    def _gate_logits(self, x: Tensor) -> Tensor:
        return self.branch_gate(self.branch_gate_hidden(x))

    def forward(self, x: Tensor, context: NSAContext, watch: bool = False) -> Attended:
        """As `AttentionLayer.forward`, with what the gates and the selection did."""
        inputs = self.projections(x, context.batch.rotary)
        result = self.attend(inputs, context)
        statistics = None
        if watch:
            statistics = branch_statistics(inputs.gates, result.block_indices, context.batch.cu_seqlens, self.config)
        return Attended(self.output(result.out), statistics)

    def projections(self, x: Tensor, rotary: Rotary) -> Projected:
        """Of tokens x [T, hidden_size] at positions with these cosines and sines."""
        k, v = self.key_value(x)
        q, branches, gates = self.rotated_query(x, rotary), [(rotate(k, *rotary), v)], self.gates(x)
        if self.sliding is not None:
            sliding_k, sliding_v = self.sliding.key_value(x)
            branches.append((rotate(sliding_k, *rotary), sliding_v))
        if self.compressed is not None:
            k, v = self.compressed.key_value(x)
        compressed = rotate(k, *rotary) if self.config.compress_rope == "before" else k, v
        return Projected(q, gates, tuple(branches), compressed)

    def attend(self, inputs: Projected, context: NSAContext) -> NSAOutput:
        """The gated sum of the branches before the output projection, [T, H, D_v], and the selected blocks.

        Where ranks share the batch the sum is that of this rank's tokens, the blocks are those its heads chose for all.
        """
        parallel = context.batch.parallel
        inputs = inputs.to_heads(parallel)
        (k, v), (sliding_k, sliding_v) = inputs.branches[0], inputs.branches[-1]
        compress_k, compress_v = inputs.compressed
        result = native_sparse_attention(
            inputs.q,
            k,
            v,
            inputs.gates,
            sliding_k=sliding_k,
            sliding_v=sliding_v,
            compress_k=compress_k,
            compress_v=compress_v,
            cu_seqlens=context.batch.cu_seqlens,
            config=self.config,
            k_weights=self.k_summary(parallel) if self.k_summary is not None else None,
            v_weights=self.v_summary(parallel) if self.v_summary is not None else None,
            compressed_rotary=context.compressed_rotary,
            layout=context.layout,
            backend=self.config.backend,
        )
        return NSAOutput(parallel.to_tokens(result.out), result.block_indices)

    def prefill(self, x: Tensor, cache: NSACache, chunk: NSAChunk) -> Attended:
        """As `AttentionLayer.prefill`."""
        tokens, config, blocks = chunk.tokens, self.config, chunk.blocks
        new, row, start = self.projections(x, tokens.rotary), tokens.row, tokens.start
        l, d = config.compress_block_size, config.compress_stride  # noqa: E741
        pending = cache.pending.extend(row, start, *new.compressed, reach=start - blocks.start * d)
        if blocks:
            unfolded = (each.unfold(0, l, d).movedim(-1, 1) for each in pending)  # 2 × [C, l, H_kv, D]
            cache.summaries.extend(row, blocks.start, *self._summaries(unfolded, chunk.block_rotary), reach=0)
        ring = cache.pending.k[row : row + 1], cache.pending.v[row : row + 1]
        started = started_blocks(ring, tokens.last.unsqueeze(0), config, self._summary_weights())
        for target, sums in zip(cache.started, started, strict=True):
            target[row] = sums[0]
        reaches = start, config.window_size - 1
        seen = [
            slots.extend(row, start, *pair, reach)
            for slots, pair, reach in zip(cache.branches, new.branches, reaches, strict=False)
        ]
        summaries = cache.summaries.k[row], cache.summaries.v[row]
        result = chunk_attention(new.q, new.gates, *seen[0], *seen[-1], *summaries, config, backend=config.backend)
        return Attended(self.output(result.out))

    def decode(self, x: Tensor, cache: NSACache, step: Step) -> Attended:
        """As `AttentionLayer.decode`."""
        mapped, config = self.mapped(x), self.config
        q, (k, v) = self.query_heads(next(mapped)), self.as_heads(next(mapped), next(mapped))
        branches = [cache.branches[0].new_tokens(k, v)]
        if self.sliding is not None:
            k_v = self.sliding.as_heads(next(mapped), next(mapped))
            branches.append(cache.branches[1].new_tokens(*k_v))
        if self.compressed is not None:
            k, v = self.compressed.as_heads(next(mapped), next(mapped))
        compressed = cache.pending.new_tokens(k, v, rotate=config.compress_rope == "before")
        gate = next(mapped, None)
        logits = (self._gate_logits(x) if gate is None else gate).unflatten(-1, (self.num_heads, 3))
        block_rotary = step.rotary_at[_centre_from_end(config)] if config.compress_rope == "after" else None
        new = NewToken(branches, compressed, cache.started, self._summary_weights(), step.rotary, block_rotary)
        result = decode_attention(
            q, logits, cache.operands(), step.positions, config, new=new, gate_logits=True, backend=config.backend
        )
        return Attended(self.output(result.out))

    def _summaries(self, blocks: Iterable[Tensor], rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Summaries of blocks of keys [C, l, H_kv, D_qk] and of values, the keys' turned by `rotary`."""
        summary_k, summary_v = map(summarise, blocks, self._summary_weights() or (None, None))
        return summary_k if rotary is None else rotate(summary_k, *rotary), summary_v

    def _summary_weights(self) -> tuple[CompressionWeights, CompressionWeights] | None:
        """The learned parts of the summaries of keys and of values, where they have one."""
        if self.k_summary is None or self.v_summary is None:
            return None
        return self.k_summary(ContextParallel()), self.v_summary(ContextParallel())

    def other_products(self, lengths: Lengths) -> int:
        """The summaries' weights, once a block."""
        weights = sum(one.multiplied_weights for one in (self.k_summary, self.v_summary) if one is not None)
        return weights * int(num_summaries(self.config, lengths).sum())

    def first_values(self, part: str) -> FirstValues | None:
        """Gates by `gate_start`; of the summaries the first layer alone, so that they are means."""
        module, _, name = part.rpartition(".")
        summary = self.get_submodule(module)
        if isinstance(summary, BlockSummary):
            return FirstValues(0.0, summary.in_std if name == "in_weight" else 0.0)
        if part == "branch_gate.bias":
            gate = self.config.gate_start
            return FirstValues(math.log(gate / (1 - gate)), 0.0)
        return None

    def drawn_as(self, part: str) -> str:
        """With `branch_start: equal` keys and values of all branches by the name of the selected branch's."""
        module, _, name = part.partition(".")
        return name if self.config.branch_start == "equal" and module in NSAKind.copies else part

    def converted_value(self, part: str, gate_bias: float) -> Tensor | None:
        """Gates of fixed weight, the selected branch's open and the others nearly shut."""
        if part == "branch_gate.bias":
            return torch.tensor([-gate_bias, gate_bias, -gate_bias]).repeat(self.num_heads)
        return torch.zeros(self.branch_gate.weight.shape) if part == "branch_gate.weight" else None


class NSAKind(AttentionKind):
    """Compressed, selected and sliding attention."""

    settings = ("nsa",)
    new_parts = ("branch_gate", "branch_gate_hidden", "k_summary", "v_summary")
    copies = ("compressed", "sliding")
    operators = ("nsa_kernels::",)
    has_branches = True

    def build(self, config: TransformerConfig) -> NSAttention:
        """A layer with the learned parts of `nsa`."""
        return NSAttention(config)

    def check(self, config: TransformerConfig) -> None:
        """Raise ValueError where no training sequence has a compression block."""
        shortest = config.nsa.compress_block_size
        if config.max_seq_len is not None and config.max_seq_len < shortest:
            raise SettingError(
                "max_seq_len (data.seq_len) must be at least nsa.compress_block_size, "
                f"got {config.max_seq_len} and {shortest}"
            )

    def allocate(self, config: TransformerConfig, room: CacheRoom) -> NSACache:
        """Slots for every token, the window and the summaries."""
        nsa = config.nsa
        size = -(-room.capacity // nsa.select_block_size) * nsa.select_block_size
        sizes = [size, min(nsa.window_size, size)] if nsa.kv_sharing == "separate" else [size]
        return NSACache(
            branches=tuple(map(room.slots, sizes)),
            pending=room.slots(nsa.compress_block_size),
            summaries=room.slots(size // nsa.compress_stride),
            started=_started(nsa, room.slots(nsa.compress_block_size // nsa.compress_stride)),
        )

    def visible_pairs(self, config: TransformerConfig, lengths: Lengths) -> Lengths:
        """Of all three branches."""
        nsa = config.nsa
        return compressed_pairs(nsa, lengths) + selected_pairs(nsa, lengths) + window_pairs(lengths, nsa.window_size)

    def context(
        self, config: TransformerConfig, batch: PackedContext, num_tokens: int, rotary: Callable[[Tensor], Rotary]
    ) -> NSAContext:
        """The batch with what the compressed branch and the kernels need besides."""
        nsa, cu_seqlens = config.nsa, batch.cu_seqlens
        compressed_rotary = None
        if nsa.compress_rope == "after":
            compressed_rotary = rotary(compressed_block_centres(cu_seqlens, num_tokens, nsa))
        layout = batch_layout(cu_seqlens, num_tokens, nsa) if cu_seqlens.is_cuda else None
        return NSAContext(batch, compressed_rotary, layout)

    def chunk(self, config: TransformerConfig, chunk: Chunk, rotary: Callable[[Tensor], Rotary]) -> NSAChunk:
        """The tokens with the compression blocks that they complete."""
        nsa, block_rotary = config.nsa, None
        blocks = _completed_blocks(nsa, chunk.start, chunk.stop)
        if nsa.compress_rope == "after":
            index = torch.arange(blocks.start, blocks.stop, device=chunk.last.device)
            block_rotary = rotary(index * nsa.compress_stride + nsa.compress_block_size // 2)
        return NSAChunk(chunk, blocks, block_rotary)

    def step_offsets(self, config: TransformerConfig) -> tuple[int, ...]:
        """To the centre of the compression block that the token would complete, where summaries are rotated."""
        return (_centre_from_end(config.nsa),) if config.nsa.compress_rope == "after" else ()


def _centre_from_end(config: NSAConfig) -> int:
    """From the last token of a compression block to its centre."""
    return 1 + config.compress_block_size // 2 - config.compress_block_size


def _completed_blocks(config: NSAConfig, start: int, end: int) -> range:
    """The compression blocks that are complete with the tokens before `end`, and were not with those before `start`."""
    first, last = (max((n - config.compress_block_size) // config.compress_stride + 1, 0) for n in (start, end))
    return range(first, last)


def _started(config: NSALayerConfig, like: TokenSlots) -> StartedBlocks:
    """Empty sums, of keys and values as in `like`."""
    k, v = (torch.zeros_like(x, dtype=torch.float32) for x in like)
    kind, hidden = config.compression, config.compression_hidden_size
    widths = [{"mean": 0, "linear": x.shape[3], "mlp": hidden or x.shape[3]}[kind] for x in like]
    return StartedBlocks(k, v, *(k.new_zeros(*k.shape[:3], width) for width in widths))
