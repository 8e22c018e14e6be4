"""Each private part of Lightning, torch and torchmetrics that training uses is there and does what is relied on."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from support.training import language_model, make_trainer, packed_batches
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from nsa_lightning.training import compat
from nsa_lightning.training.strategy import FSDP2Strategy


class Accumulates(Callback):
    """Batch, whether the optimizer's step is yet to come, and the steps that are done, after every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((batch_idx, compat.accumulates(trainer), trainer.global_step))


def test_lightning_says_whether_a_batch_ends_its_step(tmp_path):
    notes = Accumulates()
    settings = {"accumulate_grad_batches": 2, "max_steps": 4, "max_epochs": 2}
    make_trainer(tmp_path, notes, **settings).fit(language_model(), packed_batches([16], count=3))
    epoch = [(0, True), (1, False), (2, False)]  # the last batch steps without its second
    assert [(index, more) for index, more, _ in notes.seen] == epoch + epoch
    assert [step for *_, step in notes.seen] == [0, 1, 2, 2, 3, 4]


def test_lightning_knows_what_started_the_processes_of_every_strategy(tmp_path, monkeypatch):
    assert type(compat.cluster_environment(make_trainer(tmp_path))) is LightningEnvironment
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    for strategy in ("auto", "ddp", "fsdp2"):
        found = compat.cluster_environment(make_trainer(tmp_path, strategy=strategy))
        assert type(found) is TorchElasticEnvironment


def test_lightning_keeps_the_options_of_ddp():
    strategy = DDPStrategy(gradient_as_bucket_view=True)
    assert compat.ddp_option(strategy, "gradient_as_bucket_view", False) is True
    assert compat.ddp_option(DDPStrategy(), "gradient_as_bucket_view", False) is False


def test_lightnings_checkpoint_callback_keeps_its_interval():
    assert compat.time_between_savings(ModelCheckpoint(train_time_interval=timedelta(minutes=3))).seconds == 180
    assert compat.time_between_savings(ModelCheckpoint()) is None


class SaveLast(Callback):
    """Ask for `last.ckpt` twice after each step, and note how often it was written."""

    def __init__(self):
        self.written = []

    def on_train_batch_end(self, trainer, *_):
        (checkpoint,) = trainer.checkpoint_callbacks
        for _ in range(2):
            compat.save_last(checkpoint, trainer)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.written.append(trainer.global_step)


@pytest.mark.parametrize(("save_last", "written"), [(True, [1, 2]), (False, [])])
def test_lightnings_checkpoint_callback_writes_the_last_step_once(tmp_path, save_last, written):
    notes = SaveLast()
    callback = ModelCheckpoint(tmp_path, save_last=save_last, every_n_train_steps=100)
    trainer = make_trainer(tmp_path, callback, notes, enable_checkpointing=True, max_steps=2)
    trainer.fit(language_model(), packed_batches([16], count=2))
    compat.save_last(callback, trainer)  # not fitting any more
    assert notes.written == written
    assert (tmp_path / "last.ckpt").exists() is save_last


def test_lightnings_sharded_strategy_asks_its_subclass_for_backend_and_mesh(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "lightning.pytorch.strategies.model_parallel._init_dist_connection",
        lambda environment, backend, **options: calls.append(backend),
    )
    monkeypatch.setattr(FSDP2Strategy, "make_mesh", lambda strategy: calls.append(strategy.world_size) or "mesh")
    strategy = make_trainer(tmp_path, strategy="fsdp2").strategy
    strategy.connect(SimpleNamespace(trainer=None, transformer_config=SimpleNamespace(num_kv_heads=1)))
    strategy.setup_environment()
    assert calls == ["gloo", 1]
    assert strategy.device_mesh == "mesh"
    assert strategy.process_group_backend == "gloo"


def test_lightnings_sharded_strategy_keeps_the_precision_that_it_is_given(tmp_path):
    strategy = make_trainer(tmp_path, strategy="fsdp2", precision="bf16-mixed").strategy
    assert strategy.precision_plugin.precision == "bf16-mixed"
    assert isinstance(ModelParallelStrategy.precision_plugin, property)
    assert type(strategy.precision_plugin).__name__ == "ShardedMixedPrecision"


@pytest.mark.parametrize("left_out", [0.0, 1.0])
def test_a_fused_optimizer_leaves_out_a_step_that_it_is_told_to(left_out):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = AdamW([parameter], lr=0.1, fused=True)
    assert compat.takes_loss_scale(optimizer)
    compat.leave_out_step(optimizer, torch.tensor(left_out))
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3)) is bool(left_out)


def test_other_optimizers_do_not_take_a_loss_scale():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert not compat.takes_loss_scale(AdamW([parameter], fused=False))
    assert not compat.takes_loss_scale(SGD([parameter]))


def test_tensors_are_multiplied_in_place():
    tensors = [torch.full((2,), 3.0), torch.full((1, 2), 5.0)]
    compat.multiply(tensors, torch.tensor(0.5))
    assert [tensor.flatten().tolist() for tensor in tensors] == [[1.5, 1.5], [2.5, 2.5]]


def test_a_scheduler_returns_the_rates_that_it_is_given():
    scheduler = LambdaLR(SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), lambda step: 0.5)
    compat.set_last_rates(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25]
    assert scheduler.state_dict()["_last_lr"] == [0.25]


class Sum(compat.CastMetric):
    """Notes when it is cast."""

    def __init__(self):
        super().__init__()
        self.casts = []
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def on_cast(self):
        self.casts.append(self.total.dtype)

    def update(self, value):
        self.total += value

    def compute(self):
        return self.total


def test_a_metric_is_told_when_a_module_around_it_is_cast_or_moved():
    module = torch.nn.Module()
    module.metric = Sum()
    module.to(torch.bfloat16)
    module.to("cpu")
    assert module.metric.casts == [torch.bfloat16, torch.bfloat16]
