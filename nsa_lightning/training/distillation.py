"""Learning from the predictions of a model that is not trained, beside the next tokens."""

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.strategies import Strategy
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types
from torch import Tensor

from nsa_lightning.checkpoint.directory import read_config
from nsa_lightning.checkpoint.weights import WeightFiles, load_weights
from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch
from nsa_lightning.model.initialization import materialise
from nsa_lightning.model.loss import summed_divergence
from nsa_lightning.model.transformer import Transformer
from nsa_lightning.paths import expand_path
from nsa_lightning.training.strategy import FSDP2Strategy

_SETTING = "distillation.teacher"
_COMPUTE_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}
"""By the first word of trainer.precision; float32 for any other."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A dense model whose predictions are learned beside the next tokens.

    Raises:
        ValueError: the weight is not positive and finite.
    """

    teacher: str | None = None
    """Directory of the dense model, as `nsa convert` takes it; none to learn from next tokens alone."""

    weight: float = 1.0
    """Multiple of the divergence from its predictions, in nats a token, that is added to the loss."""

    def __post_init__(self) -> None:
        check_types(self, "distillation.")
        if not 0 < self.weight < float("inf"):
            raise SettingError(f"distillation.weight must be above 0 and finite, got {self.weight}")

    def check(self, vocab_size: int) -> None:
        """Refuse a teacher that does not predict the same tokens, before any data is read.

        Raises:
            ValueError: its directory holds no whole model, or its vocabulary has another size.
        """
        if self.teacher is None:
            return
        teacher = Path(expand_path(self.teacher))
        rows = read_config(teacher, _SETTING).config.vocab_size
        WeightFiles(teacher, _SETTING)
        if rows != vocab_size:
            raise SettingError(f"{_SETTING} must have the model's vocabulary of {vocab_size} tokens, got {rows}")


class Teacher:
    """A frozen model in the dtype of computation: no submodule of the one that learns, and in none of its checkpoints.

    Args:
        model: the decoder.
        max_seq_len: tokens of the context that it is made for.
    """

    def __init__(self, model: Transformer, max_seq_len: int) -> None:
        self.model, self.max_seq_len = model.requires_grad_(False), max_seq_len

    @classmethod
    def without_weights(cls, directory: Path, dtype: torch.dtype) -> "Teacher":
        """On the meta device; its config alone is read."""
        config, max_seq_len, _ = read_config(directory, _SETTING)
        with torch.device("meta"):
            return cls(Transformer(config).to(dtype), max_seq_len)

    @classmethod
    def read(cls, directory: Path, strategy: Strategy, precision: str) -> "Teacher":
        """The model of a directory, on the run's device.

        Args:
            directory: of its config and weights.
            strategy: of the run; `fsdp2` shards it as the model that learns.
            precision: trainer.precision.

        Raises:
            ValueError: its files are broken, or context_parallel_size does not divide its KV heads.
        """
        dtype = _COMPUTE_DTYPES.get(precision.partition("-")[0], torch.float32)
        teacher = cls.without_weights(directory, dtype)
        model, device = teacher.model, strategy.root_device
        if isinstance(strategy, FSDP2Strategy):
            num_kv_heads = model.config.num_kv_heads
            if num_kv_heads % strategy.context_parallel_size:
                raise SettingError(
                    f"context_parallel_size must divide num_kv_heads of {_SETTING}, "
                    f"got {strategy.context_parallel_size} and {num_kv_heads}"
                )
            strategy.shard(model)
            device = strategy.parameter_device
        materialise(model, device)
        load_weights(model, WeightFiles(directory, _SETTING))
        return teacher

    def divergence(self, learner: Transformer, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Summed divergence of a model's predictions from the teacher's, in nats, and the number of tokens compared.

        Tokens beyond the context that the teacher is made for are left out.

        Args:
            learner: the model that is trained.
            hidden: its final hidden states of this rank's tokens.
            batch: what they were computed from.
        """
        with torch.no_grad():
            own = self.model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen).hidden
        compared = (batch.targets != IGNORE_INDEX) & (batch.positions < self.max_seq_len)
        compared = learner.parallel.share(compared)
        nats = summed_divergence(hidden, learner.output_embedding, own, self.model.output_embedding, compared)
        return nats, compared.sum()
