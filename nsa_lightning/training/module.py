"""The LightningModule: it wires the decoder, its loss, optimizer and metrics together, and nothing more."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_arguments
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from nsa_lightning.checkpoint.differences import differences
from nsa_lightning.checkpoint.directory import read_config
from nsa_lightning.checkpoint.summary import check_same_sizes
from nsa_lightning.checkpoint.weights import WeightFiles, load_weights
from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.flops import training_flops
from nsa_lightning.model.initialization import materialise
from nsa_lightning.model.loss import summed_cross_entropy, token_cross_entropy
from nsa_lightning.model.recompute import Recompute
from nsa_lightning.model.transformer import Transformer, TransformerOutput
from nsa_lightning.paths import expand_path
from nsa_lightning.training.compat import accumulates, multiply, takes_loss_scale
from nsa_lightning.training.distillation import Distillation, Teacher
from nsa_lightning.training.metrics import LanguageModelingMetrics, LossByPosition
from nsa_lightning.training.optimizer import (
    ADAMW_DEFAULTS,
    NewParts,
    Schedule,
    WarmupCosine,
    check_optimizer,
    frozen_groups,
    group_schedules,
    parameter_groups,
    scale_new_parts,
)
from nsa_lightning.training.resume import ConfiguredSchedule, keep_configured, training_settings
from nsa_lightning.training.step import StepCallback, StepOutputs
from nsa_lightning.training.strategy import FSDP2Strategy

_NOMINAL_TOKENS = 2**13
"""What the loss of a batch is divided by until the tokens of its step are known; of the usual size, for float16."""


class LanguageModel(LightningModule):
    """A decoder trained on next-token prediction over packed documents.

    Args:
        transformer: sizes and choices of the decoder.
        optimizer: any torch optimizer; weight decay goes to matrices only.
        schedule: learning rate over the run, WarmupCosine or WarmupStableDecay; needs trainer.max_steps.
        compile: compile every decoder block with torch.compile.
        activation_checkpointing: what backward computes again to save memory: `none`, every `block`, or `selective`,
            which keeps attention outputs and chosen blocks and computes the rest of a block again.
        init_from: directory of `nsa convert`, or of a dense model for `full` layers, whose weights training starts
            from; random ones if not given.
        new_parts: learning rate of gates and block summaries, and for how long they train alone.
        distillation: a dense model whose predictions are learned too.
    """

    def __init__(
        self,
        transformer: TransformerConfig = TransformerConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda params: AdamW(params, **ADAMW_DEFAULTS),
        schedule: Schedule = WarmupCosine(),  # noqa: B008 (not changed after its creation)
        compile: bool = False,
        activation_checkpointing: Recompute = "none",
        init_from: str | None = None,
        new_parts: NewParts = NewParts(),  # noqa: B008 (frozen)
        distillation: Distillation = Distillation(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if isinstance(transformer, dict):  # load_from_checkpoint hands over the saved settings
            transformer = TransformerConfig.from_dict(transformer)
        check_arguments(LanguageModel.__init__, locals(), "model.")
        if init_from is not None:
            init_from = expand_path(init_from)
            transformer = _with_its_vocabulary(transformer, Path(init_from))
        distillation.check(transformer.vocab_size)
        check_optimizer(optimizer)
        self.save_hyperparameters({"transformer": dataclasses.asdict(transformer)})
        self.transformer_config = transformer
        self.optimizer_callable = optimizer
        self.schedule = schedule
        self.compile_blocks = compile
        self.activation_checkpointing = activation_checkpointing
        self.init_from = init_from
        self.new_parts = new_parts
        self.distillation = distillation
        self.model: Transformer | None = None
        self.teacher: Teacher | None = None
        self.metrics, self.loss_by_position = LanguageModelingMetrics(), LossByPosition()
        self._settings: dict[str, Any] = {}  # of training, for its checkpoints
        self._saved_settings: dict[str, Any] = {}  # those of the checkpoint that it resumes from
        self._last_offsets: Tensor | None = None  # cu_seqlens of the last training batch
        self._step_sums: Tensor | None = None  # of the batches of this step so far, over all ranks
        self._step_loss: Tensor | None = None  # mean over the tokens of those batches
        self._gradient_scale: Tensor | None = None  # makes a mean of the gradients of several batches

    @property
    def transformer(self) -> Transformer:
        """The decoder.

        Raises:
            RuntimeError: `configure_model` has not built it yet.
        """
        if self.model is None:
            raise RuntimeError("LanguageModel has no decoder yet: call configure_model first")
        return self.model

    def configure_model(self) -> None:
        """Build the decoder, once, sharded if the strategy says so: on the meta device, then its weights in place.

        The first weights depend on rank 0's seed alone, not on the number of ranks, or are those of `init_from`.
        """
        if self.model is not None:
            return
        with torch.device("meta"):
            model = Transformer(self.transformer_config, self.activation_checkpointing)
        if self.compile_blocks:
            for block in model.layers:
                block.compile()
        seed, device = torch.initial_seed(), torch.device("cpu")
        strategy = self._strategy()
        if strategy is not None:
            seed, device = strategy.broadcast(seed), strategy.root_device
            if isinstance(strategy, FSDP2Strategy):
                strategy.shard(model)
                device = strategy.parameter_device
        materialise(model, device)
        if self.init_from is None:
            model.init_weights(seed)
        else:
            load_weights(model, WeightFiles(Path(self.init_from), "model.init_from"))
        self.model = model

    def _strategy(self) -> Strategy | None:
        """The run's; none without a trainer."""
        try:
            trainer = self.trainer
        except RuntimeError:
            return None
        return trainer.strategy

    def on_fit_start(self) -> None:
        """Read the teacher, which training alone needs."""
        if self.distillation.teacher is not None:
            directory = Path(expand_path(self.distillation.teacher))
            self.teacher = Teacher.read(directory, self.trainer.strategy, str(self.trainer.precision))

    def on_fit_end(self) -> None:
        """Free the teacher's memory."""
        self.teacher = None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over named parameter groups, and the schedule stepped after every optimizer step."""
        optimizer = self.optimizer_callable(parameter_groups(self))
        scale_new_parts(optimizer, self.new_parts)
        total_steps = self.trainer.max_steps
        if total_steps < 1:
            raise SettingError(
                f"trainer.max_steps must be at least 1 for the learning-rate schedule, got {total_steps}"
            )
        schedules = group_schedules(optimizer, self.new_parts, self.schedule, total_steps)
        scheduler = ConfiguredSchedule(optimizer, schedules)
        self._settings = training_settings(optimizer, self.schedule, total_steps, self.new_parts, self.distillation)
        optimizer.register_load_state_dict_pre_hook(self._keep_configured)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _keep_configured(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return keep_configured(optimizer, state, self._saved_settings, self._settings)

    def forward(self, batch: PackedBatch, watch: bool = False) -> TransformerOutput:
        """Final hidden states of a packed batch."""
        return self.transformer(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, watch)

    def summed_loss(self, batch: PackedBatch, watch: bool = False) -> tuple[Tensor, Tensor, TransformerOutput]:
        """Summed loss in nats, number of scored tokens, and the decoder's output, of this rank's tokens."""
        output = self(batch, watch)
        targets = self.transformer.parallel.share(batch.targets)
        nats = summed_cross_entropy(output.hidden, self.transformer.output_embedding, targets, IGNORE_INDEX)
        return nats, (targets != IGNORE_INDEX).sum(), output

    def training_step(self, batch: PackedBatch, batch_idx: int) -> StepOutputs:
        """This rank's share of the step's loss: the mean over the scored tokens of all ranks and of all its batches.

        It logs that mean, and with a teacher the mean divergence over the tokens compared; those that are not add
        nothing to the loss. A batch that is all padding has loss 0.
        """
        watch = any(callback.watches_attention(self.trainer) for callback in self._step_callbacks())
        nats, tokens, output = self.summed_loss(batch, watch)
        totals = [nats, tokens]
        if self.teacher is not None:
            totals += self.teacher.divergence(self.transformer, output.hidden, batch)
        accumulate = self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            self._step_sums = None
        self._step_sums = self._sums_over_ranks(totals) + (0 if self._step_sums is None else self._step_sums)
        global_nats, global_tokens, *compared = self._step_sums.float().unbind()
        global_tokens = global_tokens.clamp(min=1)
        self._step_loss = global_nats / global_tokens
        self.log("train/loss", self._step_loss, prog_bar=True)
        share = self.trainer.world_size / global_tokens  # strategies average gradients over the ranks
        if accumulate > 1:  # the step's tokens are known after its last batch: see `backward`
            self._gradient_scale = accumulate * _NOMINAL_TOKENS * share  # Lightning divides by `accumulate`
            share = torch.full_like(share, 1 / _NOMINAL_TOKENS)
        loss = nats * share
        if compared:
            self.log("train/distillation", compared[0] / compared[1].clamp(min=1))
            loss = loss + self.distillation.weight * (totals[2] * share)
        self._last_offsets = batch.cu_seqlens
        return {"loss": loss, "statistics": output.statistics}

    def _step_callbacks(self) -> Iterator[StepCallback]:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return (callback for callback in callbacks if isinstance(callback, StepCallback))

    def _sums_over_ranks(self, totals: Sequence[Tensor]) -> Tensor:
        """Numbers of this rank summed over all ranks, in float64."""
        sums = torch.stack([total.detach().double() for total in totals])
        if torch.distributed.is_initialized():  # not through the strategy, which would wait for the device
            torch.distributed.all_reduce(sums)
        return sums

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """After the last batch of a step, make a mean of the gradient of all its batches, before anyone looks at it."""
        super().backward(loss, *args, **kwargs)
        if self._gradient_scale is None or accumulates(self.trainer):
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        gradients = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        multiply(gradients, self._gradient_scale.to(gradients[0].device))
        self._gradient_scale = None

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add the batch to the metrics."""
        losses, parallel = self._token_losses(batch), self.transformer.parallel
        scored = parallel.share(batch.targets) != IGNORE_INDEX
        self.metrics.update(losses.sum(dtype=torch.float64), scored.sum(), batch.target_bytes.sum() / parallel.size)
        self.loss_by_position.update(losses, parallel.share(batch.positions), scored)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/perplexity, val/bits_per_byte and val/loss_by_position."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log test/loss, test/perplexity, test/bits_per_byte and test/loss_by_position."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        values = {f"{stage}/{name}": value for name, value in self.metrics.compute().items()}
        self.log_dict(values, prog_bar=True, sync_dist=True)
        by_position = self.loss_by_position.compute()
        self.log_dict(
            {f"{stage}/loss_by_position/{start}": value for start, value in by_position.items()}, sync_dist=True
        )
        self.metrics.reset()
        self.loss_by_position.reset()

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Loss of every token in nats, float32 [T]; 0 where the target is not scored."""
        return self.transformer.parallel.whole(self._token_losses(batch))

    def _token_losses(self, batch: PackedBatch) -> Tensor:
        """Loss of each of this rank's tokens in nats; 0 where the target is not scored."""
        targets = self.transformer.parallel.share(batch.targets)
        return token_cross_entropy(self(batch).hidden, self.transformer.output_embedding, targets, IGNORE_INDEX)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients of what is frozen: neither weights nor moments change, and clipping does not count them.

        They are computed all the same, for DDP settles at its start which parameters have one.
        """
        for group in frozen_groups(optimizer, self.new_parts, self.global_step):
            for parameter in group["params"]:
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer is told to, and log the norm before it.

        Lightning's own clipping refuses fused optimizers in every mixed precision; with bf16, which needs no loss
        scale, nothing stands against it.
        """
        if _gradients_are_scaled(optimizer, self.trainer):
            if gradient_clip_val:
                raise SettingError(
                    "trainer.gradient_clip_val must be unset with trainer.precision=16-mixed and a fused optimizer, "
                    f"got {gradient_clip_val}; use bf16-mixed or set model.optimizer.init_args.fused to false"
                )
            return
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.log("train/grad_norm", norm)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            assert self._step_loss is not None
            for callback in self._step_callbacks():
                callback.on_before_update(self.trainer, self, optimizer, self._step_loss, norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the settings of training, for a run that resumes with others to say so."""
        checkpoint["training_settings"] = self._settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, naming what differs."""
        check_same_sizes(checkpoint["state_dict"], self.state_dict())
        self._saved_settings = checkpoint.get("training_settings", {})
        saved = checkpoint.get("hyper_parameters", {}).get("transformer", {})
        changed = differences(saved, dataclasses.asdict(self.transformer_config))
        if changed:
            rank_zero_warn(f"model.transformer differs from what the checkpoint was trained with: {'; '.join(changed)}")

    def flops(self, cu_seqlens: Tensor) -> int:
        """FLOPs of this rank on a training batch with these document offsets, int32 [N + 1]."""
        lengths = cu_seqlens.diff().long().cpu().numpy()
        return training_flops(self.transformer, lengths) // self.transformer.parallel.size

    @property
    def flops_per_batch(self) -> int | None:
        """`flops` of the last training batch, which Lightning's ThroughputMonitor reads; None outside training."""
        if not self.training or self._last_offsets is None:
            return None
        return self.flops(self._last_offsets)


def _with_its_vocabulary(transformer: TransformerConfig, directory: Path) -> TransformerConfig:
    """The context of the saved model and as many rows in the embedding, maybe more than the tokenizer needs."""
    saved = read_config(directory, "model.init_from").config
    if transformer.vocab_size > saved.vocab_size:
        raise SettingError(
            f"data.tokenizer must have at most the {saved.vocab_size} tokens of the model in model.init_from, "
            f"got {transformer.vocab_size}"
        )
    context_length = transformer.context_length or saved.context_length
    transformer = dataclasses.replace(transformer, vocab_size=saved.vocab_size, context_length=context_length)
    changed = differences(dataclasses.asdict(saved), dataclasses.asdict(transformer))
    if changed:
        rank_zero_warn(f"model.transformer differs from that of model.init_from: {'; '.join(changed)}")
    return transformer


def _gradients_are_scaled(optimizer: Optimizer, trainer: Trainer) -> bool:
    """Whether gradients still hold a loss scale before the step: a fused optimizer divides it out in its step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and takes_loss_scale(optimizer)
