"""Lightning callbacks of the toolkit."""

from nsa_lightning.training.callbacks.checkpoint import RunCheckpoint
from nsa_lightning.training.callbacks.continuations import Continuations
from nsa_lightning.training.callbacks.copy_probe import CopyProbe
from nsa_lightning.training.callbacks.document_scores import DocumentScores
from nsa_lightning.training.callbacks.gates import GateMonitor
from nsa_lightning.training.callbacks.loss_guard import LossGuard
from nsa_lightning.training.callbacks.model_size import ModelSize
from nsa_lightning.training.callbacks.report import FitReport
from nsa_lightning.training.callbacks.throughput import TokenThroughput

__all__ = [
    "Continuations",
    "CopyProbe",
    "DocumentScores",
    "FitReport",
    "GateMonitor",
    "LossGuard",
    "ModelSize",
    "RunCheckpoint",
    "TokenThroughput",
]
