"""`nsa predict`: how well the model predicts each document of the validation split."""

import json
import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from nsa_kernels.errors import SettingError
from nsa_kernels.packing import document_index
from torch import Tensor

from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.training.callbacks.lines import write_lines


class DocumentScores(Callback):
    """Write one JSON line a document piece: its beginning, tokens, bytes, loss in nats and bits per byte.

    The lines stand in the order of the batches, in one file a rank, which appears when it is complete. Of ranks that
    share their batches the first writes.

    Args:
        path: file to write; if not given, `document_scores.jsonl` in the log directory of a logger that makes one a
            version, or with the run that is measured, in `predictions/` and there by the checkpoint's name.
        preview_characters: characters of the document's beginning in each line.
    """

    def __init__(self, path: str | None = None, preview_characters: int = 60) -> None:
        if preview_characters < 0:
            raise SettingError(f"document_scores.preview_characters must be at least 0, got {preview_characters}")
        self.path, self.preview_characters = path, preview_characters
        self._lines: list[str] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what a run has left that did not end."""
        self._lines = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor,
        batch: PackedBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add up the loss of each document of the batch."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, PackedTextDataModule)
        scored = batch.targets != IGNORE_INDEX
        document = document_index(batch.cu_seqlens, len(batch.tokens))
        sums = torch.zeros(len(batch.cu_seqlens) - 1, 2, dtype=torch.float64, device=document.device)
        sums.index_add_(0, document, torch.stack([scored, outputs], dim=1).double())
        values = zip(sums.tolist(), batch.target_bytes.tolist(), batch.cu_seqlens.tolist(), strict=False)
        for (tokens, nats), num_bytes, start in values:
            if tokens:
                beginning = batch.tokens[start : start + self.preview_characters].tolist()
                line = {
                    "beginning": data.tokenizer.decode(beginning)[: self.preview_characters],
                    "tokens": int(tokens),
                    "bytes": num_bytes,
                    "nats": nats,
                    "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
                }
                self._lines.append(json.dumps(line, ensure_ascii=False))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file and say where it is."""
        lines, self._lines = self._lines, []
        write_lines(trainer, lines, self.path, "document_scores.jsonl", "document pieces scored")
