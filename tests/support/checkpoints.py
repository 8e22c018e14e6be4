"""Checkpoints as `nsa fit` writes them, without a run of it."""

from dataclasses import asdict

import torch.distributed.checkpoint as dcp

from nsa_lightning.checkpoint.atomic import save_file
from nsa_lightning.checkpoint.directory import read_config
from nsa_lightning.checkpoint.sharded import META, split
from nsa_lightning.checkpoint.weights import WeightFiles


def write_checkpoints(made, run_directory):
    """The converted model as `nsa fit` would keep it: in one file, and as a directory of shards."""
    files = WeightFiles(made, "test")
    state = {name if name.startswith("model.") else f"model.{name}": files.read(name) for name in files.shapes}
    state["model.lm_head.weight"] = state["model.embed_tokens.weight"]
    settings = {"hyper_parameters": {"transformer": asdict(read_config(made, "test").config)}}
    checkpoint = {"state_dict": state, "pytorch-lightning_version": "2", **settings}
    (run_directory / "checkpoints").mkdir(parents=True)
    (run_directory / "tokenizer.json").write_bytes((made / "tokenizer.json").read_bytes())
    save_file(checkpoint, run_directory / "checkpoints" / "last.ckpt")
    tensors, rest = split(checkpoint, [])
    dcp.save(tensors, checkpoint_id=run_directory / "checkpoints" / "sharded.ckpt", no_dist=True)
    save_file(rest, run_directory / "checkpoints" / "sharded.ckpt" / META)
