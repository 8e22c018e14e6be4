"""Tokens a second and model FLOPs utilisation."""

from lightning.pytorch.callbacks import ThroughputMonitor

from nsa_lightning.data.batch import PackedBatch


class TokenThroughput(ThroughputMonitor):
    """Lightning's ThroughputMonitor told what a token is: `items_per_sec` counts tokens.

    MFU is logged on devices whose peak Lightning knows, from the FLOPs of the documents' real lengths.

    Args:
        window_size: batches over which the rates are averaged.
    """

    def __init__(self, window_size: int = 20) -> None:
        super().__init__(batch_size_fn=_num_batches, length_fn=_num_tokens, window_size=window_size)


def _num_batches(batch: PackedBatch) -> int:
    return 1


def _num_tokens(batch: PackedBatch) -> int:
    return len(batch.tokens)
