"""How large the model is that is trained."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_summary import get_human_readable_count


class ModelSize(Callback):
    """Say how many parameters are trained: one line in the place of Lightning's table of modules."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count them, on every rank those of all."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in pl_module.parameters()]
        trained = get_human_readable_count(sum(size for size, trains in sizes if trains)).strip()
        frozen = sum(size for size, trains in sizes if not trains)
        more = f", and {get_human_readable_count(frozen).strip()} that stay as they are" if frozen else ""
        rank_zero_info(f"model: {trained} parameters to train{more}")
