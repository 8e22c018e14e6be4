import pytest
import torch
from support.training import make_trainer

from nsa_lightning.training.callbacks import TokenThroughput
from nsa_lightning.training.callbacks.throughput import peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16-mixed", 989.4e12),
        ("NVIDIA H200", "16-true", 989.4e12),
        ("NVIDIA B200", "bf16-true", 2250e12),
        ("NVIDIA H200", "32-true", None),
        ("NVIDIA GB10", "bf16-mixed", None),
    ],
)
def test_the_peak_of_gpus_that_lightning_does_not_know(name, precision, peak):
    assert peak_flops(name, precision) == peak


def test_a_gpu_whose_peak_lightning_does_not_know_has_an_mfu(tmp_path, monkeypatch):
    trainer, throughput = make_trainer(tmp_path, precision="bf16-mixed"), TokenThroughput()
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(type(trainer.strategy), "root_device", property(lambda _: torch.device("cuda")))
    monkeypatch.setattr("lightning.pytorch.callbacks.throughput_monitor.get_available_flops", lambda *_: None)
    trainer.state.fn, trainer.training = "fit", True
    throughput.setup(trainer, None, "fit")
    assert throughput.available_flops == 989.4e12
    assert throughput._throughputs["train"].available_flops == 989.4e12
