"""The linear maps of grouped-query attention, which every kind of today shares, under their Hugging Face names."""

from nsa_kernels.elementwise import rotate
from torch import Tensor, nn

from nsa_lightning.model.attention.base import AttentionLayer, Rotary
from nsa_lightning.model.config import LayerShape

# T tokens, H query heads, H_kv KV heads, D_qk and D_v head dims.


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


class GroupedQueryAttention(KeyValue, AttentionLayer):
    """A layer with projections to queries, keys and values, and from the heads' outputs back."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.num_heads = shape.num_heads
        self.q_proj = nn.Linear(shape.hidden_size, shape.num_heads * shape.head_dim, bias=shape.qkv_bias)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.o_proj = nn.Linear(shape.num_heads * shape.value_head_dim, shape.hidden_size, bias=False)

    def maps(self) -> list[nn.Linear]:
        """To queries, keys and values."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def query_heads(self, q: Tensor) -> Tensor:
        """Projected queries by head before their rotation, normed, [T, H, D_qk]."""
        q = q.unflatten(-1, (self.num_heads, -1))
        return self.q_norm(q).to(q.dtype)  # autocast leaves the norm in float32

    def rotated_query(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Queries with their position applied, [T, H, D_qk]."""
        return rotate(self.query_heads(self.q_proj(x)), *rotary)

    def output(self, heads: Tensor) -> Tensor:
        """Outputs of the heads, [T, H, D_v], as the layer adds them, [T, hidden_size]."""
        return self.o_proj(heads.flatten(1))
