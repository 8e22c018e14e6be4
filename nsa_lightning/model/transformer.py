"""The decoder: pre-norm blocks of attention and SwiGLU, as Llama 2/3, Mistral, Qwen2 and Qwen3 have them."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from nsa_kernels.elementwise import add_norm
from nsa_kernels.settings import check_arguments
from torch import Tensor, nn

from nsa_lightning.model.attention.base import Attended, AttentionLayer, FirstValues, PackedContext
from nsa_lightning.model.config import ATTENTION_KINDS, TransformerConfig
from nsa_lightning.model.context_parallel import ContextParallel
from nsa_lightning.model.feed_forward import FeedForward
from nsa_lightning.model.initialization import fill_normal
from nsa_lightning.model.recompute import Recompute, recomputed
from nsa_lightning.model.rope import RotaryEmbedding
from nsa_lightning.model.statistics import BranchStatistics


class Residual(NamedTuple):
    """The residual stream, to which what the last layer adds may be added later."""

    x: Tensor  # [T, hidden_size]
    change: Tensor | None = None  # [T, hidden_size], not yet added
    fused: bool = False  # whether it is added by the kernel that norms the sum, which has no gradient

    def normed(self, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
        """The stream with its change, and that normed."""
        if self.change is None:
            return self.x, norm(self.x)
        if not self.fused or norm.weight.is_meta:  # offloaded: it is brought to a call of the module
            x = self.x + self.change
            return x, norm(x)
        assert norm.eps is not None
        return add_norm(self.x, self.change, norm.weight, norm.eps)

    @property
    def last_token(self) -> "Residual":
        """Its part of the stream."""
        return self._replace(x=self.x[-1:], change=None if self.change is None else self.change[-1:])


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    self_attn: AttentionLayer

    def __init__(self, config: TransformerConfig, attention: str, recompute: Recompute = "none") -> None:
        super().__init__()
        check_arguments(Block.__init__, locals())
        self.recompute = recompute
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = ATTENTION_KINDS[attention].build(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, context: Any, watch: bool) -> tuple[Tensor, BranchStatistics | None]:
        """[T, hidden_size] -> [T, hidden_size], and the statistics of a layer with branches if `watch`."""
        return recomputed(self.recompute, self._layer, x, context, watch)

    def _layer(self, x: Tensor, context: Any, watch: bool) -> tuple[Tensor, BranchStatistics | None]:
        stream, statistics = self.advance(Residual(x), lambda normed: self.self_attn(normed, context, watch))
        assert stream.change is not None
        return stream.x + stream.change, statistics

    def advance(
        self, stream: Residual, attend: Callable[[Tensor], Attended]
    ) -> tuple[Residual, BranchStatistics | None]:
        """The stream after this layer, whose attention is called by `attend`, and its statistics."""
        x, normed = stream.normed(self.input_layernorm)
        attended = attend(normed)
        x, normed = Residual(x, attended.out, stream.fused).normed(self.post_attention_layernorm)
        return Residual(x, self.mlp(normed), stream.fused), attended.statistics


class TransformerOutput(NamedTuple):
    """Final hidden states; the logits are `hidden @ output_embedding.T`."""

    hidden: Tensor  # [T, hidden_size]
    statistics: dict[int, BranchStatistics]  # by layer, those with branches only; empty unless watched


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
        self.layers = nn.ModuleList(Block(config, name, recompute) for name in config.layer_attention)
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
            fill_normal(parameter, *self.first_values(name), seed, self._drawn_as(name))

    def first_values(self, name: str) -> FirstValues:
        """Of the parameter of that name."""
        path, _, kind = name.rpartition(".")
        module, (layer, part) = self.get_submodule(path), self._attention_of(name)
        own = layer.first_values(part) if layer is not None else None
        if own is not None:
            return own
        if isinstance(module, nn.RMSNorm):
            return FirstValues(1.0, 0.0)
        if isinstance(module, nn.Embedding):  # its width counts as inputs: tied, it is the output layer too
            return FirstValues(0.0, module.embedding_dim**-0.5)
        if isinstance(module, nn.Linear) and kind == "weight":
            scale = (2 * self.config.num_layers) ** -0.5 if path.endswith(("o_proj", "down_proj")) else 1.0
            return FirstValues(0.0, scale * module.in_features**-0.5)
        return FirstValues(0.0, 0.0)

    def converted_value(self, name: str, gate_bias: float) -> Tensor | None:
        """How a parameter of that name that a dense model lacks starts in a conversion; see `AttentionLayer`."""
        layer, part = self._attention_of(name)
        return layer.converted_value(part, gate_bias) if layer is not None else None

    def _drawn_as(self, name: str) -> str:
        layer, part = self._attention_of(name)
        return name.removesuffix(part) + layer.drawn_as(part) if layer is not None else name

    def _attention_of(self, name: str) -> tuple[AttentionLayer | None, str]:
        """The attention layer that has a parameter, and the parameter's name in it."""
        block, found, part = name.partition(".self_attn.")
        return (cast("Block", self.get_submodule(block)).self_attn, part) if found else (None, name)

    @property
    def blocks(self) -> list[Block]:
        """The decoder layers."""
        return cast("list[Block]", list(self.layers))

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
        contexts = self.contexts(positions, cu_seqlens, max_seqlen)
        x = self.embed_tokens(self.parallel.share(tokens))  # [T, hidden_size]
        statistics = {}
        for index, (block, context) in enumerate(zip(self.blocks, contexts, strict=True)):
            x, layer_statistics = block(x, context, watch)
            if layer_statistics is not None:
                statistics[index] = layer_statistics
        return TransformerOutput(self.norm(x), statistics)

    def join_projections(self) -> None:
        """Make a step of decoding launch less: linear maps of one input become one.

        They are not trained any more, and stay on their device.
        """
        for block in self.blocks:
            block.self_attn.join_projections()
            block.mlp.join_projections()

    def contexts(self, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> list[Any]:
        """What each layer needs to know of the batch; arguments as `forward`."""
        rotary = self.rotary(self.parallel.share(positions))
        batch = PackedContext(cu_seqlens, max_seqlen, rotary, self.parallel)
        return self.config.for_layers(lambda kind: kind.context(self.config, batch, len(positions), self.rotary))
