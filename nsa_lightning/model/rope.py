"""Rotary position embedding and its scalings for longer contexts (arXiv:2104.09864, 2306.15595, 2309.00071)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types
from torch import Tensor, nn

# T packed tokens, R rotated dimensions of a head.

USED_BY_SCALING: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"),
}
"""Settings of RopeConfig that each scaling reads, beside theta."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Frequencies of the rotary embedding and how they are scaled beyond the length they were trained at.

    Raises:
        ValueError: a value is out of range or of another type, an unknown name, or a scaling without its factor or
            original length.
    """

    theta: float = 10000.0
    """Base of the frequencies."""

    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """`linear` divides every frequency by the factor, `llama3` and `yarn` only the slow ones."""

    factor: float = 1.0
    """How many times longer the context becomes."""

    original_max_seq_len: int | None = None
    """Context length before scaling, tokens; needed by `llama3` and `yarn`."""

    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_seq_len / low_freq_factor are scaled by the whole factor."""

    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_seq_len / high_freq_factor stay as they are."""

    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over the original length stay as they are."""

    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are scaled by the whole factor."""

    attention_factor: float | None = None
    """yarn: multiplies cosines and sines; 0.1 ln(factor) + 1 if not given."""

    def __post_init__(self) -> None:
        check_types(self, "rope.")
        if self.theta <= 1:
            raise SettingError(f"rope.theta must be above 1, got {self.theta}")
        if self.factor < 1:
            raise SettingError(f"rope.factor must be at least 1, got {self.factor}")
        if self.scaling in ("llama3", "yarn") and not self.original_max_seq_len:
            raise SettingError(
                "rope.original_max_seq_len must be set with "
                f"rope.scaling={self.scaling}, got {self.original_max_seq_len}"
            )
        if self.scaling == "none" and self.factor != 1:
            raise SettingError(f"rope.factor must be 1 with rope.scaling=none, got {self.factor}")
        if self.original_max_seq_len is not None and self.original_max_seq_len < 1:
            raise SettingError(f"rope.original_max_seq_len must be at least 1, got {self.original_max_seq_len}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise SettingError(
                "rope.high_freq_factor must be above rope.low_freq_factor, "
                f"got {self.high_freq_factor} and {self.low_freq_factor}"
            )
        if self.beta_fast <= self.beta_slow:
            raise SettingError(
                f"rope.beta_fast must be above rope.beta_slow, got {self.beta_fast} and {self.beta_slow}"
            )


def rotary_frequencies(config: RopeConfig, rotary_dim: int, device: torch.device | None = None) -> Tensor:
    """Radians a token for each pair of dimensions, float32 [R/2], fastest first."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    frequencies = 1.0 / config.theta**exponent
    if config.scaling == "none":
        return frequencies
    scaled = frequencies / config.factor
    if config.scaling == "linear":
        return scaled
    assert config.original_max_seq_len is not None
    if config.scaling == "llama3":
        turns = config.original_max_seq_len * frequencies / (2 * math.pi)  # over the original length
        keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    else:  # yarn: a ramp over dimensions, from the one that turns beta_fast times to the one that turns beta_slow times
        fast, slow = (
            rotary_dim * math.log(config.original_max_seq_len / (beta * 2 * math.pi)) / (2 * math.log(config.theta))
            for beta in (config.beta_fast, config.beta_slow)
        )
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), rotary_dim - 1)
        pair = torch.arange(rotary_dim // 2, dtype=torch.float32, device=device)
        keep = 1 - (pair - low) / max(high - low, 0.001)
    keep = keep.clamp(0, 1)
    return scaled * (1 - keep) + frequencies * keep


class RotaryEmbedding(nn.Module):
    """Cosines and sines of token positions, computed in float32 on demand.

    No table bounds the context length, and no buffer can be cast down: bf16 frequencies turn the wrong way.
    """

    def __init__(self, config: RopeConfig, rotary_dim: int) -> None:
        super().__init__()
        self.config, self.rotary_dim = config, rotary_dim
        self.factor = 1.0
        if config.scaling == "yarn":
            default = 0.1 * math.log(config.factor) + 1.0
            self.factor = default if config.attention_factor is None else config.attention_factor
        self._frequencies: dict[torch.device, Tensor] = {}

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [T, R/2] each, of integer positions [T]."""
        angles = positions[:, None].float() * self._frequencies_on(positions.device)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.factor == 1 else (cos * self.factor, sin * self.factor)

    def _frequencies_on(self, device: torch.device) -> Tensor:
        """Kept where no gradient is wanted: a step of decoding would wait for the dozen launches that compute them."""
        frequencies = self._frequencies.get(device)
        if frequencies is None:
            frequencies = rotary_frequencies(self.config, self.rotary_dim, device)
            if not torch.is_grad_enabled():
                self._frequencies[device] = frequencies
        return frequencies
