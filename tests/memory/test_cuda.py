"""The estimate against what a GPU's allocator counts."""

import pytest
import torch
from nsa_cli.memory_settings import step_settings
from support.packings import cu_seqlens
from support.training import make_trainer
from torch.utils.data import DataLoader

from nsa_lightning.data.batch import PackedBatch
from nsa_lightning.memory.estimate import estimate_memory
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.training.module import LanguageModel

pytestmark = pytest.mark.gpu

CONFIG = TransformerConfig(
    vocab_size=16384, hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=4, intermediate_size=2048
)
TRAINER = {
    "strategy": "auto", "precision": "bf16-mixed", "devices": 1, "num_nodes": 1,
    "accumulate_grad_batches": 1, "logger": False,
}  # fmt: skip


def batch(length):
    tokens = torch.randint(0, CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    return PackedBatch(tokens, tokens, torch.arange(length), cu_seqlens([length]), length, torch.tensor(length))


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
@pytest.mark.parametrize("length", [8192, 32768])
def test_the_peak_of_training_is_within_a_tenth_of_the_estimate(length, recompute, tmp_path):
    module = LanguageModel(CONFIG, activation_checkpointing=recompute)
    estimate = estimate_memory(module, step_settings(TRAINER, length, 1, None)).worst[1].total
    module = LanguageModel(CONFIG, activation_checkpointing=recompute)
    trainer = make_trainer(tmp_path, accelerator="gpu", precision="bf16-mixed", max_steps=2)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, DataLoader([batch(length)] * 2, batch_size=None))
    measured = torch.cuda.max_memory_allocated()
    print(f"\n{length} tokens, {recompute}: estimated {estimate / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB")
    assert trainer.global_step == 2
    assert abs(estimate / measured - 1) < 0.1
