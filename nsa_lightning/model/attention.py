"""The attention layers of the decoder: `nsa`, `full` and `sliding`, one choice a layer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from nsa_kernels import CompressionWeights, NSAConfig, NSAOutput, native_sparse_attention
from nsa_kernels.decode.attention import (
    NewToken,
    append_tokens,
    chunk_attention,
    decode_attention,
    decode_dense_attention,
)
from nsa_kernels.decode.eager import started_blocks
from nsa_kernels.eager.compress import summarise
from nsa_kernels.elementwise import rotate
from nsa_kernels.errors import SettingError
from nsa_kernels.packing import BatchLayout
from nsa_kernels.settings import check_arguments
from torch import Tensor, nn

from nsa_lightning.model.cache import Chunk, LayerTokens, Step
from nsa_lightning.model.context_parallel import ContextParallel
from nsa_lightning.model.fused_attention import chunk_causal_attention, packed_causal_attention
from nsa_lightning.model.joint_projection import JointProjection, outputs
from nsa_lightning.model.statistics import BranchStatistics, branch_statistics

AttentionKind = Literal["nsa", "full", "sliding"]
Rotary = tuple[Tensor, Tensor]

# T packed tokens, H query heads, H_kv KV heads, D_qk and D_v head dims, C rows of compressed blocks, l tokens in one.


@dataclass(frozen=True, kw_only=True)
class NSALayerConfig(NSAConfig):
    """Geometry and learned parts of the NSA layers (arXiv:2502.11089).

    Raises:
        ValueError: as NSAConfig, an unknown name, or a hidden size that is not positive.
    """

    compression: Literal["mean", "linear", "mlp"] = "mlp"
    """Block summary: the mean alone, or the mean plus a learned map that starts at zero."""

    compression_hidden_size: int | None = None
    """Hidden units of the `mlp` summary; the head dimension if not given."""

    compress_rope: Literal["after", "before", "none"] = "after"
    """Rotate the key summary at its block's centre, rotate the keys before they are summarised, or neither."""

    kv_sharing: Literal["separate", "shared"] = "separate"
    """Own key and value projections for every branch (the paper), or one pair for all."""

    gate_hidden_size: int | None = None
    """Hidden units of the gate MLP; a single linear map if not given."""

    backend: Literal["auto", "triton", "eager", "reference"] = "auto"
    """Implementation of the attention operator; `auto` picks the fastest that takes the device and the sizes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("compression_hidden_size", "gate_hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")


class PackedContext(NamedTuple):
    """What every layer needs to know of the packed batch."""

    cu_seqlens: Tensor  # int32 [N + 1]
    max_seqlen: int
    rotary: Rotary  # cosines and sines of the positions of this rank's tokens, [T, R/2] each
    compressed_rotary: Rotary | None  # the same at the centres of compression blocks, [C, R/2] each
    layout: BatchLayout | None = None  # where documents and blocks lie, for the NSA layers
    parallel: ContextParallel = ContextParallel()  # the ranks that share the batch


class LayerShape(NamedTuple):
    """Sizes of one attention layer."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float


class KeyValue(nn.Module):
    """Keys and values of one branch: x [T, hidden_size] -> k [T, H_kv, D_qk], v [T, H_kv, D_v]."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.num_kv_heads = shape.num_kv_heads
        self.k_proj = nn.Linear(shape.hidden_size, shape.num_kv_heads * shape.head_dim, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, shape.num_kv_heads * shape.value_head_dim, bias=shape.qkv_bias)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before their rotation, and values."""
        return self.as_heads(self.k_proj(x), self.v_proj(x))

    def as_heads(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Projected keys and values by head, the keys normed."""
        k = k.unflatten(-1, (self.num_kv_heads, -1))
        return self.k_norm(k).to(k.dtype), v.unflatten(-1, (self.num_kv_heads, -1))


class DenseAttention(KeyValue):
    """Grouped-query causal attention to the whole document (`full`) or its last tokens (`sliding`)."""

    def __init__(self, shape: LayerShape, window_size: int | None = None) -> None:
        super().__init__(shape)
        self.num_heads, self.window_size = shape.num_heads, window_size
        self.q_proj = nn.Linear(shape.hidden_size, shape.num_heads * shape.head_dim, bias=shape.qkv_bias)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.o_proj = nn.Linear(shape.num_heads * shape.value_head_dim, shape.hidden_size, bias=False)
        self._joint: JointProjection | None = None

    def maps(self) -> list[nn.Linear]:
        """The linear maps of the layer's input: to queries, keys and values."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def join_projections(self) -> None:
        """Compute all maps of the input as one when decoding; they are not trained any more."""
        if self._joint is None or not self._joint.holds(self.maps()):
            self._joint = JointProjection(self.maps())

    def mapped(self, x: Tensor) -> Iterator[Tensor]:
        """The output of each of `maps`."""
        return iter(outputs(self._joint, self.maps(), x))

    def query_heads(self, q: Tensor) -> Tensor:
        """Projected queries by head before their rotation, normed, [T, H, D_qk]."""
        q = q.unflatten(-1, (self.num_heads, -1))
        return self.q_norm(q).to(q.dtype)  # autocast leaves the norm in float32

    def rotated_query(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Queries with their position applied, [T, H, D_qk]."""
        return rotate(self.query_heads(self.q_proj(x)), *rotary)

    def forward(self, x: Tensor, context: PackedContext, watch: bool = False) -> tuple[Tensor, BranchStatistics | None]:
        """[T, hidden_size] -> [T, hidden_size]; a dense layer has no branches to watch."""
        k, v = self.key_value(x)
        q, k = self.rotated_query(x, context.rotary), rotate(k, *context.rotary)
        q, k, v = context.parallel.to_heads(q, k, v)
        out = packed_causal_attention(q, k, v, context.cu_seqlens, context.max_seqlen, self.window_size)
        return self.o_proj(context.parallel.to_tokens(out).flatten(1)), None

    def prefill(self, x: Tensor, cache: LayerTokens, chunk: Chunk) -> Tensor:
        """Append T tokens to one sequence of the cache and attend them to it, [T, hidden_size] in and out."""
        k, v = self.key_value(x)
        q, k = self.rotated_query(x, chunk.rotary), rotate(k, *chunk.rotary)
        reach = chunk.start if self.window_size is None else self.window_size - 1
        k, v = cache.tokens.extend(chunk.row, chunk.start, k, v, reach)
        return self.o_proj(chunk_causal_attention(q, k, v, self.window_size).flatten(1))

    def decode(self, x: Tensor, cache: LayerTokens, step: Step) -> Tensor:
        """Append one token to each sequence of the cache and attend it to its own, [B, hidden_size] in and out."""
        q, k, v = self.mapped(x)
        new = cache.tokens.new_tokens(*self.as_heads(k, v))
        q = append_tokens(self.query_heads(q), [new], step.positions, step.rotary)
        out = decode_dense_attention(q, cache.tokens.k, cache.tokens.v, step.positions, self.window_size)
        return self.o_proj(out.flatten(1))


class BlockSummary(nn.Module):
    """The learned part of φ(x) = mean(x) + f(x + e), one per KV head; it starts at zero."""

    def __init__(self, num_kv_heads: int, head_dim: int, config: NSALayerConfig) -> None:
        super().__init__()
        block_size = config.compress_block_size
        mlp = config.compression == "mlp"
        hidden = (config.compression_hidden_size or head_dim) if mlp else head_dim
        self.position_embedding = nn.Parameter(torch.zeros(num_kv_heads, block_size, head_dim))
        self.in_weight = nn.Parameter(torch.zeros(num_kv_heads, block_size * head_dim, hidden))
        self.in_bias = nn.Parameter(torch.zeros(num_kv_heads, hidden))
        self.out_weight = nn.Parameter(torch.zeros(num_kv_heads, hidden, head_dim)) if mlp else None
        self.out_bias = nn.Parameter(torch.zeros(num_kv_heads, head_dim)) if mlp else None

    @property
    def in_std(self) -> float:
        """Deviation of the first layer's weights to begin with; everything else is 0, so the summary is the mean."""
        return self.in_weight.shape[1] ** -0.5 if self.out_weight is not None else 0.0

    @property
    def multiplied_weights(self) -> int:
        """Weights that one block of tokens is multiplied with."""
        return self.in_weight.numel() + (self.out_weight.numel() if self.out_weight is not None else 0)

    def forward(self, parallel: ContextParallel) -> CompressionWeights:
        """The parameters as the operator takes them, those of this rank's KV heads.

        It is called as a module, so that what brings offloaded parameters to a call brings them here too.
        """
        return CompressionWeights(
            parallel.share(self.position_embedding),
            parallel.share(self.in_weight),
            parallel.share(self.in_bias),
            parallel.share(self.out_weight) if self.out_weight is not None else None,
            parallel.share(self.out_bias) if self.out_bias is not None else None,
        )


class NSAttention(DenseAttention):
    """Native Sparse Attention: compressed, selected and sliding branch, summed by learned gates.

    The inherited `k_proj` and `v_proj` serve the selected branch, and with `kv_sharing: shared` all of them.
    """

    def __init__(self, shape: LayerShape, config: NSALayerConfig) -> None:
        super().__init__(shape)
        self.config = config
        separate = config.kv_sharing == "separate"
        self.compressed = KeyValue(shape) if separate else None
        self.sliding = KeyValue(shape) if separate else None
        learned = config.compression != "mean"
        self.k_summary = BlockSummary(shape.num_kv_heads, shape.head_dim, config) if learned else None
        self.v_summary = BlockSummary(shape.num_kv_heads, shape.value_head_dim, config) if learned else None
        gate_inputs = config.gate_hidden_size or shape.hidden_size
        self.branch_gate = nn.Linear(gate_inputs, 3 * shape.num_heads)
        self.branch_gate_hidden = (
            nn.Sequential(nn.Linear(shape.hidden_size, gate_inputs), nn.SiLU())
            if config.gate_hidden_size
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

    def forward(self, x: Tensor, context: PackedContext, watch: bool = False) -> tuple[Tensor, BranchStatistics | None]:
        """[T, hidden_size] -> [T, hidden_size], and what the gates and the selection did if `watch`."""
        inputs = self.projections(x, context.rotary)
        result = self.attend(inputs, context)
        statistics = None
        if watch:
            statistics = branch_statistics(inputs["gates"], result.block_indices, context.cu_seqlens, self.config)
        return self.o_proj(result.out.flatten(1)), statistics

    def projections(self, x: Tensor, rotary: Rotary) -> dict[str, Tensor]:
        """What tokens attend with and are attended by, as `native_sparse_attention` names it."""
        k, v = self.key_value(x)
        inputs = {"q": self.rotated_query(x, rotary), "k": rotate(k, *rotary), "v": v, "gates": self.gates(x)}
        if self.sliding is not None:
            sliding_k, inputs["sliding_v"] = self.sliding.key_value(x)
            inputs["sliding_k"] = rotate(sliding_k, *rotary)
        if self.compressed is not None:
            k, inputs["compress_v"] = self.compressed.key_value(x)
        inputs["compress_k"] = rotate(k, *rotary) if self.config.compress_rope == "before" else k
        return inputs

    def attend(self, inputs: dict[str, Tensor], context: PackedContext) -> NSAOutput:
        """The gated sum of the branches before the output projection, [T, H, D_v], and the selected blocks.

        Where ranks share the batch the sum is that of this rank's tokens, the blocks are those its heads chose for all.
        """
        parallel = context.parallel
        received: dict[str, Any] = dict(zip(inputs, parallel.to_heads(*inputs.values()), strict=True))
        result = native_sparse_attention(
            **received,
            cu_seqlens=context.cu_seqlens,
            config=self.config,
            k_weights=self.k_summary(parallel) if self.k_summary is not None else None,
            v_weights=self.v_summary(parallel) if self.v_summary is not None else None,
            compressed_rotary=context.compressed_rotary if self.config.compress_rope == "after" else None,
            layout=context.layout,
            backend=self.config.backend,
        )
        return NSAOutput(parallel.to_tokens(result.out), result.block_indices)

    def prefill(self, x: Tensor, cache: LayerTokens, chunk: Chunk) -> Tensor:
        """Append T tokens to one sequence of the cache and attend them to it, [T, hidden_size] in and out."""
        assert cache.pending is not None
        assert cache.summaries is not None
        assert cache.started is not None
        new, row, start, config = self.projections(x, chunk.rotary), chunk.row, chunk.start, self.config
        l, d, first = config.compress_block_size, config.compress_stride, chunk.blocks.start  # noqa: E741
        pending = cache.pending.extend(row, start, *_summarised(new), reach=start - first * d)
        if chunk.blocks:
            blocks = (tokens.unfold(0, l, d).movedim(-1, 1) for tokens in pending)  # 2 × [C, l, H_kv, D]
            cache.summaries.extend(row, first, *self._summaries(blocks, chunk.block_rotary), reach=0)
        ring = cache.pending.k[row : row + 1], cache.pending.v[row : row + 1]
        started = started_blocks(ring, chunk.last.unsqueeze(0), config, self._summary_weights())
        for target, sums in zip(cache.started, started, strict=True):
            target[row] = sums[0]
        selected = sliding = cache.tokens.extend(row, start, new["k"], new["v"], reach=start)
        if cache.sliding is not None:
            sliding = cache.sliding.extend(row, start, new["sliding_k"], new["sliding_v"], config.window_size - 1)
        pairs = (*selected, *sliding, cache.summaries.k[row], cache.summaries.v[row])
        result = chunk_attention(new["q"], new["gates"], *pairs, config, backend=config.backend)
        return self.o_proj(result.out.flatten(1))

    def decode(self, x: Tensor, cache: LayerTokens, step: Step) -> Tensor:
        """Append one token to each sequence of the cache and attend it to its own, [B, hidden_size] in and out."""
        assert cache.pending is not None
        assert cache.summaries is not None
        assert cache.started is not None
        mapped, config = self.mapped(x), self.config
        q, (k, v) = self.query_heads(next(mapped)), self.as_heads(next(mapped), next(mapped))
        branches = [cache.tokens.new_tokens(k, v)]
        if self.sliding is not None:
            assert cache.sliding is not None
            branches.append(cache.sliding.new_tokens(*self.sliding.as_heads(next(mapped), next(mapped))))
        if self.compressed is not None:
            k, v = self.compressed.as_heads(next(mapped), next(mapped))
        compressed = cache.pending.new_tokens(k, v, rotate=config.compress_rope == "before")
        gate = next(mapped, None)
        logits = (self._gate_logits(x) if gate is None else gate).unflatten(-1, (self.num_heads, 3))
        new = NewToken(branches, compressed, cache.started, self._summary_weights(), step.rotary, step.block_rotary)
        result = decode_attention(
            q, logits, cache.operands(), step.positions, config, new=new, gate_logits=True, backend=config.backend
        )
        return self.o_proj(result.out.flatten(1))

    def _summaries(self, blocks: Iterable[Tensor], rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Summaries of blocks of keys [C, l, H_kv, D_qk] and of values, the keys' turned by `rotary`."""
        summary_k, summary_v = map(summarise, blocks, self._summary_weights() or (None, None))
        return summary_k if rotary is None else rotate(summary_k, *rotary), summary_v

    def _summary_weights(self) -> tuple[CompressionWeights, CompressionWeights] | None:
        """The learned parts of the summaries of keys and of values, where they have one."""
        if self.k_summary is None or self.v_summary is None:
            return None
        return self.k_summary(ContextParallel()), self.v_summary(ContextParallel())


def _summarised(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of the compressed branch."""
    return inputs["compress_k"], inputs.get("compress_v", inputs["v"])


def is_new_part(name: str) -> bool:
    """Whether the parameter of that name belongs to what a dense model has no counterpart of: gates and summaries."""
    return not {"branch_gate", "branch_gate_hidden", "k_summary", "v_summary"}.isdisjoint(name.split("."))


def build_attention(kind: AttentionKind, shape: LayerShape, nsa: NSALayerConfig, sliding_window: int) -> DenseAttention:
    """The attention layer of that name."""
    check_arguments(build_attention, locals())
    if kind == "nsa":
        return NSAttention(shape, nsa)
    return DenseAttention(shape, window_size=sliding_window if kind == "sliding" else None)
