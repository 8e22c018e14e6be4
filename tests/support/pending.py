"""Sequences whose last token completes a compression block, or does not: what `summarise_blocks` is given."""

import torch
from nsa_kernels import CompressionWeights, NSAConfig
from nsa_kernels.decode import summarise_blocks
from torch import Tensor


class PendingTokens:
    """The last l tokens of sequences of the given lengths, weights, and summaries in which every row holds something.

    Drawn in float64 and cast: one seed is one problem in every dtype. A slot that no token has taken holds NaN.
    """

    def __init__(
        self,
        lengths: list[int],
        config: NSAConfig,
        shape: tuple[int, int, int],  # H_kv, D_qk, D_v
        kind: str = "mlp",
        hidden_size: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        generator = torch.Generator().manual_seed(0)

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(size, dtype=torch.float64, generator=generator).mul(scale).to(device, dtype)

        (H_KV, *dims), l = shape, config.compress_block_size  # noqa: E741
        B, C = len(lengths), max(lengths) // config.compress_stride + 1
        self.documents = tuple(random(B, max(lengths), H_KV, D) for D in dims)
        self.pending = tuple(torch.full((B, l, H_KV, D), torch.nan, device=device, dtype=dtype) for D in dims)
        self.summaries = tuple(random(B, C, H_KV, D) for D in dims)
        self.rotary = tuple(random(B, dims[0] // 4).float() for _ in range(2))  # half of the dimensions, as pairs
        self.weights = None if kind == "mean" else tuple(
            CompressionWeights(
                random(H_KV, l, D), random(H_KV, l * D, M, scale=(l * D) ** -0.5), random(H_KV, M),
                *((random(H_KV, M, D, scale=M**-0.5), random(H_KV, D)) if kind == "mlp" else ()),
            )
            for D in dims
            for M in [(hidden_size or D) if kind == "mlp" else D]
        )  # fmt: skip
        self.blocks = torch.zeros(B, dtype=torch.int64, device=device)
        self.set_lengths(lengths)

    def set_lengths(self, lengths: list[int]) -> None:
        """Let the sequences have so many tokens."""
        l, d = self.config.compress_block_size, self.config.compress_stride  # noqa: E741
        for b, length in enumerate(lengths):
            for token in range(max(0, length - l), length):
                for ring, document in zip(self.pending, self.documents, strict=True):
                    ring[b, token % l] = document[b, token]
            self.blocks[b] = (length - l) // d if length >= l and (length - l) % d == 0 else -1

    def summarised(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All rows of the summaries afterwards, all inputs cast."""
        cast = dtype or self.dtype
        pending, summaries = (tuple(x.to(cast, copy=True) for x in pair) for pair in (self.pending, self.summaries))
        weights = self.weights and tuple(
            CompressionWeights(*(None if x is None else x.to(cast) for x in side)) for side in self.weights
        )
        summarise_blocks(
            pending, summaries, self.blocks, self.config.compress_stride, weights, self.rotary, backend=backend
        )
        return dict(zip(("keys", "values"), summaries, strict=True))

    def assert_no_other_row_changed(self, result: dict[str, Tensor]) -> None:
        """Every row of the summaries but those of the completed blocks is as it was."""
        for actual, before in zip(result.values(), self.summaries, strict=True):
            untouched = torch.ones(before.shape[:2], dtype=torch.bool, device=self.device)
            untouched[torch.arange(len(self.blocks)), self.blocks] &= self.blocks < 0
            assert torch.equal(actual[untouched], before[untouched])
