"""`nsa predict`: how the model goes on after the beginning of each document of the validation split."""

import json
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_arguments
from torch import Tensor

from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.generation.decoder import Decoder
from nsa_lightning.generation.generate import Generation, StopConfig
from nsa_lightning.generation.sampling import Sampler, SamplingConfig
from nsa_lightning.training.callbacks.lines import write_lines
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.strategy import FSDP2Strategy


class Continuations(Callback):
    """Write one JSON line a document piece: its beginning, what the model writes after it, and what stands there.

    The lines stand in the order of the batches, in one file a rank, which appears when it is complete.

    Args:
        max_new_tokens: longest continuation, tokens; nothing is written if not given.
        prompt_tokens: tokens of the beginning; pieces that are not longer are left out.
        sampling: how tokens are drawn; the likeliest each time if not given.
        batch_size: pieces that are continued at once.
        path: file to write; if not given, `continuations.jsonl` in the log directory of a logger that makes one a
            version, or with the run that is measured, in `predictions/` and there by the checkpoint's name.
    """

    def __init__(
        self,
        max_new_tokens: int | None = None,
        prompt_tokens: int = 64,
        sampling: SamplingConfig = SamplingConfig(temperature=0),  # noqa: B008 (frozen)
        batch_size: int = 8,
        path: str | None = None,
    ) -> None:
        check_arguments(Continuations.__init__, locals(), "generate.")
        for name, value in {
            "max_new_tokens": max_new_tokens,
            "prompt_tokens": prompt_tokens,
            "batch_size": batch_size,
        }.items():
            if value is not None and value < 1:
                raise SettingError(f"generate.{name} must be at least 1, got {value}")
        self.stop = StopConfig(max_new_tokens=max_new_tokens) if max_new_tokens is not None else None
        self.prompt_tokens, self.sampling, self.batch_size, self.path = prompt_tokens, sampling, batch_size, path
        self._loop: Generation | None = None
        self._lines: list[str] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for the sequences, and forget what a run has left that did not end.

        Raises:
            ValueError: the weights are shards, which the decoding loop does not gather.
        """
        self._lines = []
        if self.stop is None:
            return
        if isinstance(trainer.strategy, FSDP2Strategy):
            raise SettingError(
                "generate.max_new_tokens must be unset with trainer.strategy=fsdp2, whose weights are shards, "
                f"got {self.stop.max_new_tokens}; nsa generate reads its checkpoints"
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, PackedTextDataModule)
        assert isinstance(pl_module, LanguageModel)
        capacity = self.prompt_tokens + self.stop.max_new_tokens
        decoder = Decoder(pl_module.transformer, self.batch_size, capacity, cuda_graphs=False)
        sampler = Sampler(self.sampling, self.batch_size, pl_module.transformer.config.vocab_size, pl_module.device)
        self._loop = Generation(decoder, sampler, data.tokenizer, {data.tokenizer.end_of_text_id}, self.stop)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor,
        batch: PackedBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Continue the pieces of the batch."""
        if self._loop is None or self.stop is None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        lengths: list[int] = batch.cu_seqlens.diff().tolist()
        pieces = [
            piece
            for piece, targets in zip(batch.tokens.split(lengths), batch.targets.split(lengths), strict=True)
            if len(piece) > self.prompt_tokens and targets[0] != IGNORE_INDEX  # padding is a document too
        ]
        prompts = [piece[: self.prompt_tokens].tolist() for piece in pieces]
        texts = [""] * len(pieces)
        with torch.autocast(batch.tokens.device.type, enabled=False):
            for part in self._loop.run(prompts):
                texts[part.prompt] += part.text
        for piece, prompt, text in zip(pieces, prompts, texts, strict=True):
            true = piece[self.prompt_tokens : self.prompt_tokens + self.stop.max_new_tokens].tolist()
            line = {"prompt": data.tokenizer.decode(prompt), "continuation": text, "true": data.tokenizer.decode(true)}
            self._lines.append(json.dumps(line, ensure_ascii=False))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file and say where it is."""
        lines, self._lines, written = self._lines, [], self._loop is not None
        self._loop = None
        if written:
            write_lines(trainer, lines, self.path, "continuations.jsonl", "document pieces continued")
