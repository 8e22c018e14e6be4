"""The config with which `nsa fit` trains a converted model on."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nsa_lightning.model.config import TransformerConfig

FILE = "continue.yaml"

_GATES_LR_FACTOR = 10.0
"""Of the learning rate where gates alone are new; it did harm to the maps of learned summaries."""

_HEAD = """\
# Train the converted model on: nsa fit --config {path} --data.sources '["/path/to/texts/**/*.jsonl.gz"]'
# Its weights start from model.init_from. Gates and block summaries (model.new_parts) can have a learning rate of their
# own, and learn alone for some steps. Every setting is explained by `nsa fit --help`. To
#   learn from the source's predictions too     --model.distillation.teacher {source}
#   train the source on in the same way         --model.init_from {source} --model.transformer.attention '[full]'
#   measure what training starts from           nsa validate --config {path}
"""


def write_continuation(directory: Path, final: Path, source: Path, config: TransformerConfig, seq_len: int) -> None:
    """Write `continue.yaml` into a directory that will have the path `final`."""
    transformer = asdict(config)
    for linked in ("vocab_size", "max_seq_len"):  # nsa fit takes them from the tokenizer and data.seq_len
        del transformer[linked]
    lr_factor = _GATES_LR_FACTOR if config.nsa.compression == "mean" else 1.0
    settings: dict[str, Any] = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "auto",
            "devices": 1,
            "precision": "bf16-mixed",
            "max_steps": 1000,
            "val_check_interval": 250,
            "limit_val_batches": 20,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "gradient_clip_val": 1.0,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": "runs", "name": final.name, "default_hp_metric": False},
            },
        },
        "model": {
            "init_from": str(final),
            "activation_checkpointing": "selective",
            "transformer": transformer,
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "fused": True},
            },
            "schedule": {"class_path": "WarmupCosine", "init_args": {"warmup_steps": 50}},
            "new_parts": {"lr_factor": lr_factor, "freeze_others_steps": 0},
        },
        "data": {
            "sources": ["data/**/*.jsonl.gz"],
            "tokenizer": {"path": str(final / "tokenizer.json")},
            "seq_len": seq_len,
            "batch_size": 1,
        },
    }
    head = _HEAD.format(path=final / FILE, source=source.resolve())
    (directory / FILE).write_text(head + yaml.safe_dump(settings, sort_keys=False))
