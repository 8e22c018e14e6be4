"""Whether the model copies: the loss of random tokens that a document repeats."""

from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_arguments
from torch import Tensor

from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.training.module import LanguageModel

_SHORTEST = 64
"""Tokens of the shortest piece that is repeated where no lengths are given."""

# L tokens of a piece, 2 L of a document that repeats it, T of a batch.


class CopyProbe(Callback):
    """Measure in every validation how well the model copies from its context.

    A document holds a piece of random tokens twice. The second time they can be told by copying alone, from L tokens
    back: `val/copying/L` is their mean loss in nats a token. A model that does not copy stays at the entropy of the
    tokens, which are drawn as often as the training data has them. Copying is what parts attention kinds early in
    training, long before their losses settle.

    Args:
        lengths: tokens of the repeated pieces; the powers of two from 64 to half of data.seq_len if not given.
        num_documents: documents of each length.
        seed: draws the tokens.

    Raises:
        ValueError: a length or a number is too small, or a document would be longer than data.seq_len.
    """

    def __init__(self, lengths: list[int] | None = None, num_documents: int = 2, seed: int = 0) -> None:
        check_arguments(CopyProbe.__init__, locals(), "copy_probe.")
        if lengths is not None and (not lengths or min(lengths) < 2):
            raise SettingError(f"copy_probe.lengths must be one or more numbers of at least 2, got {lengths}")
        if num_documents < 1:
            raise SettingError(f"copy_probe.num_documents must be at least 1, got {num_documents}")
        self.lengths, self.num_documents, self.seed = lengths, num_documents, seed
        self._batches: list[PackedBatch] = []
        self._scored: list[tuple[int, int, slice]] = []  # length, batch, where its repeated tokens are predicted

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lay the documents out in sequences of the training's length."""
        assert isinstance(pl_module, LanguageModel)
        seq_len = pl_module.transformer_config.max_seq_len or 2 * max(self.lengths or [_SHORTEST])
        lengths = self.lengths or [2**power for power in range(6, (seq_len // 2).bit_length())]
        if 2 * max(lengths, default=0) > seq_len:
            raise SettingError(
                f"copy_probe.lengths must be at most half of data.seq_len, got {max(lengths)} of {seq_len}"
            )
        if not lengths:
            raise SettingError(f"copy_probe.lengths must be given where data.seq_len is below 128, it is {seq_len}")
        weights = _token_weights(trainer, pl_module.transformer_config.vocab_size)
        generator = torch.Generator().manual_seed(self.seed)
        self._batches, self._scored = [], []
        for row in _fitted(sorted(lengths * self.num_documents, reverse=True), seq_len):
            documents = [torch.multinomial(weights, length, True, generator=generator).repeat(2) for length in row]
            start = 0
            for length in row:
                self._scored.append((length, len(self._batches), slice(start + length, start + 2 * length - 1)))
                start += 2 * length
            if start < seq_len:
                documents.append(torch.multinomial(weights, seq_len - start, True, generator=generator))
            self._batches.append(_packed(documents))

    @torch.inference_mode()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean loss of the repeated tokens, by length; the same on every rank."""
        assert isinstance(pl_module, LanguageModel)
        if trainer.sanity_checking:
            return
        losses = []
        for index, batch in enumerate(self._batches):
            with trainer.precision_plugin.val_step_context():
                losses.append(pl_module.predict_step(trainer.strategy.batch_to_device(batch), index))
        by_length: dict[int, list[Tensor]] = {}
        for length, index, place in self._scored:
            by_length.setdefault(length, []).append(losses[index][place].mean())
        for length in sorted(by_length):
            pl_module.log(f"val/copying/{length}", torch.stack(by_length[length]).mean())


def _token_weights(trainer: Trainer, vocab_size: int) -> Tensor:
    """How often each token is drawn: as often as in training, but never the one that ends a text; else all alike."""
    data = getattr(trainer, "datamodule", None)
    weights = torch.zeros(vocab_size, dtype=torch.float64)
    if not isinstance(data, PackedTextDataModule):
        return weights + 1
    for store in data.stores:
        counts = torch.from_numpy(store.token_counts("train"))
        weights[: len(counts)] += counts
    weights[data.tokenizer.end_of_text_id] = 0
    return weights


def _fitted(lengths: Sequence[int], seq_len: int) -> Iterator[list[int]]:
    """The pieces, longest first, by the sequences that hold them with their repetitions."""
    rows: list[list[int]] = []
    for length in lengths:
        row = next((row for row in rows if 2 * (sum(row) + length) <= seq_len), None)
        if row is None:
            rows.append(row := [])
        row.append(length)
    yield from rows


def _packed(documents: Sequence[Tensor]) -> PackedBatch:
    """Documents as one batch, all of their next tokens scored."""
    ends = torch.tensor([len(document) for document in documents]).cumsum(0)
    tokens = torch.cat(list(documents))
    targets = tokens.roll(-1).index_fill(0, ends - 1, IGNORE_INDEX)
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    return PackedBatch(
        tokens, targets, positions, cu_seqlens, len(tokens), torch.zeros(len(documents), dtype=torch.int64)
    )
