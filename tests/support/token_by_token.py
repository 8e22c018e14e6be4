"""Sequences that grow by a token in every step, through `decode_attention` and through what it is made of."""

import torch
from nsa_kernels import CompressionWeights, NSAConfig, NSAOutput, reference
from nsa_kernels.decode.attention import LayerCache, NewToken, NewTokens, StartedBlocks, append_tokens, decode_attention
from nsa_kernels.decode.eager import started_blocks
from nsa_kernels.rotary import apply_rotary
from torch import Tensor

from support.packings import cu_seqlens


class GrowingSequences:
    """A layer's cache of sequences of the given lengths, and the tokens to come.

    Drawn in float64 and cast: one seed is one problem in every dtype. What no token has written holds 1e4.
    """

    def __init__(
        self,
        lengths: list[int],
        steps: int,
        config: NSAConfig,
        shape: tuple[int, int, int, int],  # H, H_kv, D_qk, D_v
        kind: str = "mlp",
        hidden_size: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> None:
        self.config, self.dtype, self.lengths = config, dtype, list(lengths)
        generator = torch.Generator().manual_seed(0)

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(size, dtype=torch.float64, generator=generator).mul(scale).to(device, dtype)

        (H, H_KV, *dims), l = shape, config.compress_block_size  # noqa: E741
        B, end = len(lengths), max(lengths) + steps
        self.q, self.gates = random(end, B, H, dims[0]), random(end, B, H, 3).sigmoid()
        self.tokens = [random(B, end, H_KV, D) for D in 3 * dims]  # selected, sliding and compressed branch
        self.weights = None if kind == "mean" else tuple(
            CompressionWeights(
                random(H_KV, l, D), random(H_KV, l * D, M, scale=(l * D) ** -0.5), random(H_KV, M),
                *((random(H_KV, M, D, scale=M**-0.5), random(H_KV, D)) if kind == "mlp" else ()),
            )
            for D in dims
            for M in [(hidden_size or D) if kind == "mlp" else D]
        )  # fmt: skip
        slots = -(-end // config.select_block_size) * config.select_block_size
        sizes = slots, config.window_size + 1, slots // config.compress_stride
        self.cache = LayerCache(*(random(B, n, H_KV, D).fill_(1e4) for n in sizes for D in dims))
        self.ring = tuple(random(B, l, H_KV, D).fill_(1e4) for D in dims)
        self.positions = torch.tensor(lengths, dtype=torch.int32, device=device) - 1
        for b, length in enumerate(lengths):
            for i, x in enumerate((*self.cache[:4], *self.ring)):
                for token in range(max(0, length - x.shape[1]), length):
                    x[b, token % x.shape[1]] = self._rotated(i, b, token)
            for rows, summaries in zip(self.cache[4:], self.summaries(b), strict=True):
                rows[b, : len(summaries)] = summaries
        self.started = StartedBlocks(*started_blocks(self.ring, self.positions.long(), config, self.weights))

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of half of the key's dimensions, as pairs."""
        angles = positions[:, None] * 10.0 ** -torch.arange(self.q.shape[-1] // 4, device=positions.device)
        return angles.cos(), angles.sin()

    def _rotated(self, i: int, b: int, token: int) -> Tensor:
        """Token of a sequence as part i of the cache holds it."""
        x = self.tokens[i][b, token]
        rotates = i in (0, 2)
        return apply_rotary(x[None], *self._angles(torch.tensor([token], device=x.device)))[0] if rotates else x

    def summaries(self, b: int) -> tuple[Tensor, Tensor]:
        """Of every complete block of one sequence."""
        l, d, length = self.config.compress_block_size, self.config.compress_stride, self.lengths[b]  # noqa: E741
        count = max((length - l) // d + 1, 0)
        document = cu_seqlens([length]).to(self.q.device)
        k, v = (
            reference.compress(x[b, :length], document, self.config, learned)[:count] if count else x[b, :0]
            for x, learned in zip(self.tokens[4:], self.weights or (None, None), strict=True)
        )
        return apply_rotary(k, *self._angles(torch.arange(count, device=k.device) * d + l // 2)), v

    def new_token(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, LayerCache, NewToken]:
        """Queries, gates, a copy of the cache and the next token of each sequence, cast."""
        cast, device = dtype or self.dtype, self.q.device
        cache, ring = ([x.to(cast, copy=True) for x in part] for part in (self.cache, self.ring))
        B, positions = torch.arange(len(self.lengths), device=device), torch.tensor(self.lengths, device=device)
        pairs = [
            NewTokens(*(x[B, positions].to(cast) for x in self.tokens[i : i + 2]), *slots, rotate=i < 4)
            for i, slots in ((0, cache[:2]), (2, cache[2:4]), (4, ring))
        ]
        l = self.config.compress_block_size  # noqa: E741
        angles, centres = self._angles(positions), (positions + 1 - l + l // 2).clamp(min=0)
        weights = self.weights and tuple(
            CompressionWeights(*(None if x is None else x.to(cast) for x in side)) for side in self.weights
        )
        started = StartedBlocks(*(x.clone() for x in self.started))
        new = NewToken(pairs[:2], pairs[2], started, weights, angles, self._angles(centres))
        rows = self.q[positions, B].to(cast), self.gates[positions, B].to(cast)
        return *rows, LayerCache(*cache), new

    def rotated_queries(self, q: Tensor) -> Tensor:
        """Queries of the next tokens with their position applied."""
        return apply_rotary(q, *self._angles(self.positions + 1))

    def step(self, backend: str, dtype: torch.dtype | None = None) -> tuple[NSAOutput, LayerCache, NewToken]:
        """Attend the next tokens, which `decode_attention` appends; the cache that it leaves."""
        q, gates, cache, new = self.new_token(dtype)
        result = decode_attention(q, gates, cache, self.positions + 1, self.config, new=new, backend=backend)
        return result, cache, new

    def grow(self) -> NSAOutput:
        """Append the next tokens by `append_tokens` and whole summaries, and attend them."""
        q, gates, cache, new = self.new_token()
        self.positions, self.lengths = self.positions + 1, [length + 1 for length in self.lengths]
        q = append_tokens(q, [*new.branches, new.compressed], self.positions, new.rotary, backend="eager")
        self.cache, self.ring = cache, (new.compressed.k_slots, new.compressed.v_slots)
        for b in range(len(self.lengths)):
            for rows, summaries in zip(cache[4:], self.summaries(b), strict=True):
                rows[b, : len(summaries)] = summaries
        self.started = StartedBlocks(*started_blocks(self.ring, self.positions.long(), self.config, self.weights))
        return decode_attention(q, gates, cache, self.positions, self.config, backend="eager")
