"""The decoder: pre-norm blocks of attention and SwiGLU, as Llama 2/3, Mistral, Qwen2 and Qwen3 have them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from nsa_kernels.elementwise import add_norm
from nsa_kernels.errors import SettingError
from nsa_kernels.packing import batch_layout, compressed_block_centres
from nsa_kernels.settings import check_arguments, check_types
from torch import Tensor, nn

from nsa_lightning.model.attention import (
    AttentionKind,
    BlockSummary,
    LayerShape,
    NSALayerConfig,
    PackedContext,
    build_attention,
)
from nsa_lightning.model.cache import Cache, Chunk, LayerTokens, Step
from nsa_lightning.model.context_parallel import ContextParallel
from nsa_lightning.model.feed_forward import FeedForward
from nsa_lightning.model.initialization import fill_normal
from nsa_lightning.model.recompute import Recompute, recomputed
from nsa_lightning.model.rope import RopeConfig, RotaryEmbedding
from nsa_lightning.model.statistics import BranchStatistics


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and choices of the decoder.

    Raises:
        ValueError: sizes that do not fit each other, an unknown name, or a value of another type.
    """

    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's vocabulary."""

    hidden_size: int = 768
    """Width of the residual stream."""

    num_layers: int = 12
    """Decoder blocks."""

    num_heads: int = 12
    """Query heads; a multiple of num_kv_heads."""

    num_kv_heads: int = 4
    """Key/value heads (GQA)."""

    head_dim: int | None = None
    """Dimensions of a query and key head; hidden_size / num_heads if not given."""

    value_head_dim: int | None = None
    """Dimensions of a value head; head_dim if not given."""

    intermediate_size: int = 2048
    """Hidden units of the feed-forward layer."""

    attention: list[AttentionKind] = field(default_factory=lambda: cast("list[AttentionKind]", ["nsa"]))
    """Attention by layer: `nsa`, `full` or `sliding`; a shorter list repeats over the layers."""

    sliding_window: int = 4096
    """Tokens that a `sliding` layer sees, the query's own included."""

    nsa: NSALayerConfig = field(default_factory=NSALayerConfig)
    """The `nsa` layers."""

    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary position embedding."""

    max_seq_len: int | None = None
    """Longest training sequence, tokens; `nsa fit` takes it from data.seq_len."""

    context_length: int | None = None
    """Tokens of the longest text that the model is made for, which generation and exports tell. Left out: that of
    model.init_from, else the longest training sequence or what the scaling of rope reaches."""

    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    qk_norm: bool = False
    """RMSNorm on every query and key head (Qwen3)."""

    qkv_bias: bool = False
    """Bias in the query, key and value projections (Qwen2)."""

    tie_embeddings: bool = True
    """Use the input embedding as output embedding."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "value_head_dim",
            "intermediate_size",
            "sliding_window",
            "context_length",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise SettingError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise SettingError(
                "hidden_size must be a multiple of num_heads where head_dim is not set, "
                f"got {self.hidden_size} and {self.num_heads}"
            )
        if self.norm_eps < 0:
            raise SettingError(f"norm_eps must be at least 0, got {self.norm_eps}")
        if self.query_head_dim % 2:
            raise SettingError(f"head_dim must be even for rotary embedding, got {self.query_head_dim}")
        if not self.attention or self.num_layers % len(self.attention):
            raise SettingError(
                "attention must have a length that divides num_layers, "
                f"got {len(self.attention)} names for {self.num_layers} layers"
            )
        shortest = self.nsa.compress_block_size if "nsa" in self.attention else 1
        if self.max_seq_len is not None and self.max_seq_len < shortest:
            raise SettingError(
                "max_seq_len (data.seq_len) must be at least nsa.compress_block_size, "
                f"got {self.max_seq_len} and {shortest}"
            )

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "TransformerConfig":
        """The config whose `dataclasses.asdict` is `settings`, as checkpoints hold it."""
        nested = {"nsa": NSALayerConfig(**settings["nsa"]), "rope": RopeConfig(**settings["rope"])}
        return cls(**(settings | nested))

    @property
    def query_head_dim(self) -> int:
        """Dimensions of a query and key head (D_qk)."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def layer_shape(self) -> LayerShape:
        """Sizes of every attention layer."""
        return LayerShape(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.query_head_dim,
            value_head_dim=self.query_head_dim if self.value_head_dim is None else self.value_head_dim,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
        )

    @property
    def layer_attention(self) -> list[AttentionKind]:
        """The attention of each layer, num_layers names."""
        return self.attention * (self.num_layers // len(self.attention))


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: TransformerConfig, attention: AttentionKind, recompute: Recompute = "none") -> None:
        super().__init__()
        check_arguments(Block.__init__, locals())
        self.recompute = recompute
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = build_attention(attention, config.layer_shape, config.nsa, config.sliding_window)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, context: PackedContext, watch: bool) -> tuple[Tensor, BranchStatistics | None]:
        """[T, hidden_size] -> [T, hidden_size], and the statistics of an NSA layer if `watch`."""
        return recomputed(self.recompute, self._layer, x, context, watch)

    def _layer(self, x: Tensor, context: PackedContext, watch: bool) -> tuple[Tensor, BranchStatistics | None]:
        attended, statistics = self.self_attn(self.input_layernorm(x), context, watch)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), statistics

    def prefill(self, stream: "Residual", cache: LayerTokens, chunk: Chunk) -> "Residual":
        """New tokens of one sequence of the cache, [T, hidden_size] in and out."""
        x, normed = stream.normed(self.input_layernorm)
        return self._feed_forward(Residual(x, self.self_attn.prefill(normed, cache, chunk)))

    def decode(self, stream: "Residual", cache: LayerTokens, step: Step) -> "Residual":
        """A new token of each sequence of the cache, [B, hidden_size] in and out."""
        x, normed = stream.normed(self.input_layernorm)
        return self._feed_forward(Residual(x, self.self_attn.decode(normed, cache, step)))

    def _feed_forward(self, stream: "Residual") -> "Residual":
        x, normed = stream.normed(self.post_attention_layernorm)
        return Residual(x, self.mlp(normed))


class Residual(NamedTuple):
    """The residual stream while no gradient is wanted: what the last layer adds is added where the next one norms."""

    x: Tensor  # [T, hidden_size]
    change: Tensor | None = None  # [T, hidden_size]

    def normed(self, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
        """The stream with its change, and that normed."""
        if self.change is None:
            return self.x, norm(self.x)
        if norm.weight.is_meta:  # offloaded: it is brought to a call of the module
            x = self.x + self.change
            return x, norm(x)
        assert norm.eps is not None
        return add_norm(self.x, self.change, norm.weight, norm.eps)

    @property
    def last_token(self) -> "Residual":
        """Its part of the stream."""
        return Residual(self.x[-1:], None if self.change is None else self.change[-1:])


class TransformerOutput(NamedTuple):
    """Final hidden states; the logits are `hidden @ output_embedding.T`."""

    hidden: Tensor  # [T, hidden_size]
    statistics: dict[int, BranchStatistics]  # by layer, NSA layers only; empty unless watched


class Transformer(nn.Module):
    """The decoder without its loss. Parameters carry the names of Hugging Face checkpoints.

    Args:
        config: sizes and choices.
        recompute: what backward computes again instead of keeping it.
    """

    def __init__(self, config: TransformerConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        check_arguments(Transformer.__init__, locals())
        self.config = config
        self.parallel = ContextParallel()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kind, recompute) for kind in config.layer_attention)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.rotary = RotaryEmbedding(config.rope, config.query_head_dim)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if not self.norm.weight.is_meta:
            self.init_weights()

    def init_weights(self, seed: int | None = None) -> None:
        """Normal weights of deviation 1 / sqrt(inputs), those that write to the residual stream smaller.

        Their deviation is divided by sqrt(2 · layers). Every parameter has its own generator: its numbers depend on
        the seed and its name, not on how the model is sharded.

        Args:
            seed: drawn from torch's own generator if not given.
        """
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        for name, parameter in self.named_parameters():
            fill_normal(parameter, *self.first_values(name), seed, name)

    def first_values(self, name: str) -> tuple[float, float]:
        """Mean and deviation of the parameter of that name."""
        path, _, kind = name.rpartition(".")
        module = self.get_submodule(path)
        if isinstance(module, nn.RMSNorm):
            return 1.0, 0.0
        if isinstance(module, nn.Embedding):  # its width counts as inputs: tied, it is the output layer too
            return 0.0, module.embedding_dim**-0.5
        if isinstance(module, nn.Linear) and kind == "weight":
            scale = (2 * self.config.num_layers) ** -0.5 if path.endswith(("o_proj", "down_proj")) else 1.0
            return 0.0, scale * module.in_features**-0.5
        if isinstance(module, BlockSummary) and kind == "in_weight":
            return 0.0, module.in_std
        return 0.0, 0.0

    @property
    def output_embedding(self) -> Tensor:
        """Weight of the output layer, [vocab_size, hidden_size]."""
        return self.lm_head.weight

    def forward(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int, watch: bool = False
    ) -> TransformerOutput:
        """Final hidden states of packed documents; of its part of the tokens alone on a rank that shares them.

        Args:
            tokens: int64 [T].
            positions: position of each token in its document, int64 [T].
            cu_seqlens: document offsets, int32 [N + 1].
            max_seqlen: an upper bound on the longest document.
            watch: gather what gates and selection do.
        """
        context = self.context(positions, cu_seqlens, max_seqlen)
        x = self.embed_tokens(self.parallel.share(tokens))  # [T, hidden_size]
        statistics = {}
        for index, layer in enumerate(self.layers):
            x, layer_statistics = layer(x, context, watch)
            if layer_statistics is not None:
                statistics[index] = layer_statistics
        return TransformerOutput(self.norm(x), statistics)

    def join_projections(self) -> None:
        """Make a step of decoding launch less: linear maps of one input become one.

        They are not trained any more, and stay on their device.
        """
        for layer in cast("Iterable[Block]", self.layers):
            layer.self_attn.join_projections()
            layer.mlp.join_projections()

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: Cache, row: int, chunk_size: int = 16384, every: bool = False) -> Tensor:
        """Append tokens to one sequence of the cache, behind those that it holds; interrupted, it holds none.

        Args:
            tokens: int64 [T].
            cache: of this model's config.
            row: index of the sequence.
            chunk_size: tokens that are computed at a time, which bounds the memory beside the cache.
            every: return the states of every token.

        Returns:
            Final hidden states of the last token, [hidden_size]; of every token [T, hidden_size].

        Raises:
            ValueError: there are no tokens, more than the cache has room for, or chunk_size is not positive.
        """
        if chunk_size < 1:
            raise SettingError(f"chunk_size must be at least 1, got {chunk_size}")
        if tokens.ndim != 1 or not len(tokens):
            raise SettingError(f"tokens must be [T] with at least one token, got {tuple(tokens.shape)}")
        cache.check_room(row, len(tokens))
        hidden = []
        try:
            for part in tokens.split(chunk_size):
                chunk = cache.chunk(row, len(part), self.rotary)
                cache.count_chunk(row, len(part))
                stream = Residual(self.embed_tokens(part))
                for layer, kept in self._layers_with(cache):
                    stream = layer.prefill(stream, kept, chunk)
                if every:
                    hidden.append(stream.normed(self.norm)[1])
        except BaseException:  # some layers hold the tokens, some do not
            cache.reset(row)
            raise
        return torch.cat(hidden) if every else stream.last_token.normed(self.norm)[1][0]

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Append one token to each sequence of the cache.

        Nothing is read back to the host, and shapes and addresses stay as they are: fit for a CUDA graph, captured
        with an empty cache that is reset afterwards, with `cache.count_step()` before each replay.

        Args:
            tokens: int64 [B].
            cache: of this model's config.

        Returns:
            Final hidden states, [B, hidden_size].

        Raises:
            ValueError: not one token a sequence, or a sequence is at its capacity.
        """
        if tokens.shape != cache.lengths.shape:
            raise SettingError(f"tokens must be [B], {tuple(cache.lengths.shape)} here, got {tuple(tokens.shape)}")
        cache.check_step()
        step = cache.step(self.rotary)
        stream = Residual(self.embed_tokens(tokens))
        for layer, kept in self._layers_with(cache):
            stream = layer.decode(stream, kept, step)
        torch.add(step.positions, 1, out=cache.lengths)
        cache.count_step()
        return stream.normed(self.norm)[1]

    def _layers_with(self, cache: Cache) -> Iterator[tuple[Block, LayerTokens]]:
        return zip(cast("Iterable[Block]", self.layers), cache.layers, strict=True)

    def context(self, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> PackedContext:
        """What every layer needs to know of the batch; arguments as `forward`."""
        compressed_rotary = None
        if "nsa" in self.config.attention and self.config.nsa.compress_rope == "after":
            compressed_rotary = self.rotary(compressed_block_centres(cu_seqlens, len(positions), self.config.nsa))
        layout = None
        if "nsa" in self.config.attention and positions.is_cuda:
            layout = batch_layout(cu_seqlens, len(positions), self.config.nsa)
        rotary = self.rotary(self.parallel.share(positions))
        return PackedContext(cu_seqlens, max_seqlen, rotary, compressed_rotary, layout, self.parallel)
