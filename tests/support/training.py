"""Small training runs, in this process or as a job of several."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader

from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.tokenizer import TokenizerConfig
from nsa_lightning.model.config import NSALayerConfig, TransformerConfig
from nsa_lightning.training.callbacks import DocumentScores, LossGuard, TokenThroughput
from nsa_lightning.training.checkpoint_io import RunCheckpointIO
from nsa_lightning.training.compat import accumulates
from nsa_lightning.training.distillation import Distillation
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.optimizer import NewParts, WarmupCosine
from nsa_lightning.training.step import StepCallback
from nsa_lightning.training.strategy import FSDP2Strategy

NSA = NSALayerConfig(
    kv_sharing="separate",
    branch_start="independent",
    compress_block_size=8,
    compress_stride=4,
    select_block_size=8,
    num_selected_blocks=4,
    window_size=16,
)
CONFIG = TransformerConfig(
    vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=1, intermediate_size=48, nsa=NSA
)


def write_corpus(root):
    """Twelve small source files."""
    for index in range(12):
        lines = [f"def function_{index}_{i}(x):\n    return x * {i} + {index}\n" for i in range(12)]
        (root / f"file_{index}.py").write_text("\n".join(lines))


def write_uneven_corpus(root):
    """Five small source files, of which no two fit into a sequence of 128 tokens."""
    for index, functions in enumerate((7, 4, 4, 4, 7)):
        lines = [f"def function_{index}_{i}(x):\n    return x * {i} + {index}\n" for i in range(functions)]
        (root / f"file_{index}.py").write_text("\n".join(lines))


def data_module(corpus, **changes):
    settings = {
        "sources": [str(corpus / "*.py")],
        "tokenizer": TokenizerConfig(vocab_size=300),
        "seq_len": 128,
        "batch_size": 2,
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "num_workers": 0,
        "cache_dir": str(corpus / "cache"),
    }
    return PackedTextDataModule(**(settings | changes))


def packed_batches(lengths, *, count):
    """Batches of random tokens in documents of these lengths."""
    total, generator = sum(lengths), torch.Generator().manual_seed(0)
    ends = torch.tensor(lengths).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in lengths])
    batches = []
    for _ in range(count):
        tokens = torch.randint(CONFIG.vocab_size, (total,), generator=generator)
        targets = tokens.roll(-1).index_fill(0, ends - 1, IGNORE_INDEX)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
        batches.append(PackedBatch(tokens, targets, positions, cu_seqlens, max(lengths), torch.tensor(3 * total)))
    return DataLoader(batches, batch_size=None)


def language_model(transformer=None, new_parts=None, distillation=None, **changes):
    settings = transformer or {}
    settings = settings | {"nsa": dataclasses.replace(NSA, **settings.get("nsa", {}))}
    config = dataclasses.replace(CONFIG, **settings)
    changes |= {"new_parts": NewParts(**(new_parts or {})), "distillation": Distillation(**(distillation or {}))}
    return LanguageModel(config, schedule=WarmupCosine(warmup_steps=2), **changes)


def whole(tensor):
    """A copy on the host, of all shards."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().to("cpu", copy=True)


class Notes(Callback):
    """Loss and gradient norm of every step, and the gradients of the last one before they are clipped."""

    def __init__(self):
        self.losses, self.norms, self.gradients, self.divergences = [], [], {}, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {name: whole(p.grad) for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not accumulates(trainer):
            self.losses.append(trainer.callback_metrics["train/loss"].item())
            self.norms.append(trainer.callback_metrics["train/grad_norm"].item())
            if "train/distillation" in trainer.callback_metrics:
                self.divergences.append(trainer.callback_metrics["train/distillation"].item())


STRATEGIES = {
    "fsdp2_one_file": {"save_distributed_checkpoint": False},
    "fsdp2_offload": {"cpu_offload": True},
    "fsdp2_async": {"async_checkpoint": True},
    "fsdp2_reducing": {"reduce_every_batch": True},
    "context_parallel": {"context_parallel_size": 2},
    "context_parallel_4": {"context_parallel_size": 4},
    "context_parallel_8": {"context_parallel_size": 8},
}
"""Variants of the strategy, by a name that a job can be told."""


def make_trainer(root, *callbacks, strategy="auto", **changes):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "strategy": FSDP2Strategy(**STRATEGIES[strategy]) if strategy in STRATEGIES else strategy,
        "max_steps": 4,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 0,
        "gradient_clip_val": 0.5,
        "callbacks": list(callbacks),
        "plugins": [RunCheckpointIO()],
    }
    return Trainer(**(settings | changes))


class SaveAfter(Callback):
    """Save a checkpoint after some step, where RunCheckpoint would."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not accumulates(trainer):
            trainer.save_checkpoint(self.path)


class Watch(TokenThroughput, StepCallback):
    """Sums over the ranks of what the attention layers did in the last step, and of its tokens and FLOPs."""

    def __init__(self):
        super().__init__()
        self.statistics, self.counts = {}, []

    def watches_attention(self, trainer):
        return True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for layer, parts in outputs["statistics"].items():
            sums = torch.cat([part.flatten() for part in parts])
            self.statistics[layer] = whole(trainer.strategy.reduce(sums, reduce_op="sum"))
        counts = torch.tensor([self.length_fn(batch), pl_module.flops_per_batch], device=pl_module.device)
        self.counts = trainer.strategy.reduce(counts, reduce_op="sum").tolist()


class Poison(Callback):
    """In one step, a gradient of the last rank is not a number."""

    def __init__(self, step):
        self.step = step

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            gradient = pl_module.model.layers[0].mlp.up_proj.weight.grad
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[0, 0] = float("nan")


def fit(
    root, corpus, *, resume=None, save=None, save_after=None, poison=None, lengths=None, scores=False, data=None,
    model=None, **settings,
):  # fmt: skip
    """What a run did: losses, norms, the last gradients, the weights, what it watched, its validation metrics if any.

    It reads the corpus, or random tokens in documents of some lengths. Afterwards it may score the validation split.
    """
    seed_everything(0, verbose=False)
    notes, watch = Notes(), Watch()
    others = [SaveAfter(save_after, save)] if save else []
    others += [Poison(poison), LossGuard(skip=True)] if poison is not None else []
    others += [DocumentScores()] if scores else []
    trainer = make_trainer(root, notes, watch, *others, **settings)
    module = language_model(**(model or {}))
    source = packed_batches(lengths, count=trainer.max_steps) if lengths else data_module(corpus, **(data or {}))
    trainer.fit(module, source, ckpt_path=resume)
    weights = {name: whole(value) for name, value in module.model.state_dict().items()}
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    if scores:
        trainer.predict(module, source, return_predictions=False)
    return {
        "losses": notes.losses,
        "norms": notes.norms,
        "divergences": notes.divergences,
        "gradients": notes.gradients,
        "weights": weights,
        "metrics": metrics,
        "statistics": watch.statistics,
        "counts": watch.counts,
    }


def run_job(folder, *runs, ranks=2, timeout=120):
    """Results of several `fit` calls in a job of several processes, as rank 0 saw them."""
    result = folder / "results.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "PYTHONPATH": paths,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    command = [sys.executable, "-m", "support.training", str(result), json.dumps(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=timeout)
    if b"SIGABRT" in done.stderr:  # gloo's threads now and then spoil the heap, those of a bare all_reduce too
        done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return torch.load(result, weights_only=True)


def run_rank(rank, target, runs):
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    results = [fit(Path(run.pop("root")), Path(run.pop("corpus")), devices=ranks, **run) for run in runs]
    if rank == 0:
        torch.save(results, target)
    os._exit(0)  # gloo's threads now and then abort an ordinary exit


if __name__ == "__main__":  # ranks are forked off one process: what they import is imported once
    job = (sys.argv[1], json.loads(sys.argv[2]))
    start_processes(run_rank, job, nprocs=int(os.environ["WORLD_SIZE"]), start_method="fork")
