"""Stage 2: attend each query to the summaries of the blocks in its past (arXiv:2502.11089, eq. 5 and 7)."""

from torch import Tensor

from nsa_kernels.eager.chunks import ChunkedAttention, RunsInChunks, chunk_size, default_scale
from nsa_kernels.geometry import NSAConfig
from nsa_kernels.packing import visible_summaries

# T packed tokens, H query heads, H_kv KV heads, D_qk and D_v head dims, C rows of compressed blocks.


def compressed_attention(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query to the visible block summaries; see `reference.compressed_attention`."""
    config = config.within(len(q))
    runs = visible_compressed_rows(cu_seqlens, config, len(q), len(compressed_k), 4 * q.shape[1])
    return ChunkedAttention.apply(q, compressed_k, compressed_v, compressed_k.shape[1], default_scale(q, scale), runs)


def visible_compressed_rows(
    cu_seqlens: Tensor, config: NSAConfig, num_tokens: int, num_rows: int, bytes_per_score: int
) -> RunsInChunks:
    """The compressed rows each query sees: whole blocks in its past or present."""
    first, end = visible_summaries(cu_seqlens, num_tokens, config)
    chunk = chunk_size(cu_seqlens.device, num_rows * bytes_per_score)
    chunks = []
    for start in range(0, num_tokens, chunk):
        queries = slice(start, min(start + chunk, num_tokens))
        if cu_seqlens.device.type == "cpu":  # reading a bound costs nothing here
            low, high = int(first[queries].min()), int(end[queries].max())
        else:
            low, high = 0, queries.stop // config.compress_stride
        low = min(low, num_rows - 1)
        chunks.append((queries, slice(low, min(max(high, low + 1), num_rows))))
    return RunsInChunks(first, end, chunks)
