"""Activation checkpointing changes what is kept, and nothing else."""

from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from support.packings import cu_seqlens
from support.recorder import OperatorRecorder
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_lightning.model import Transformer, TransformerConfig, compat, context_parallel
from nsa_lightning.model.config import NSALayerConfig

LENGTHS = [24, 13]
NSA = NSALayerConfig(
    kv_sharing="separate",
    branch_start="independent",
    compress_block_size=8,
    compress_stride=4,
    select_block_size=8,
    num_selected_blocks=4,
    window_size=16,
)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 64,
    "nsa": NSA,
}


class CountAttention(TorchDispatchMode):
    """Calls of the dense attention operator."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.calls += "_scaled_dot_product_" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def gradients(attention, recompute, lengths=LENGTHS, **changes):
    """Gradients by name, and the number of elements kept for backward."""
    model = Transformer(TransformerConfig(**(SIZES | changes), attention=[attention]), recompute=recompute)
    model.init_weights(0)
    kept = []
    tokens = torch.arange(sum(lengths)) % 50
    positions = torch.cat([torch.arange(length) for length in lengths])
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        output = model(tokens, positions, cu_seqlens(lengths), max(lengths))
    output.hidden.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept)


@pytest.mark.parametrize("recompute", ["block", "selective"])
@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_gradients_are_the_same_and_less_is_kept(attention, recompute):
    expected, all_kept = gradients(attention, "none")
    actual, kept = gradients(attention, recompute)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert kept < all_kept / 4


def test_selective_runs_no_dense_attention_twice():
    calls = {}
    for recompute in ("none", "block", "selective"):
        with CountAttention() as counter:
            gradients("full", recompute)
        calls[recompute] = counter.calls
    assert calls["block"] == 2 * calls["none"] > 0
    assert calls["selective"] == calls["none"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
def test_selective_runs_no_kernel_of_the_forward_twice():
    pytest.importorskip("triton")
    counts = {}
    for recompute in ("none", "block", "selective"):
        with OperatorRecorder() as recorder:
            gradients("nsa", recompute, lengths=[9, 2], num_layers=1, nsa=replace(NSA, backend="triton"))
        counts[recompute] = [
            recorder.count(getattr(torch.ops.nsa_kernels, name).default)
            for name in ("gated_branches", "block_selection", "compressed_attention")
        ]
    assert counts == {"none": [1, 1, 1], "block": [2, 2, 2], "selective": [1, 1, 1]}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_compiled_block_keeps_its_input_alone(monkeypatch, ranks):
    """What ranks that share a batch exchange is exchanged again; torch 2.11 kept what was not an operator."""
    pytest.importorskip("triton")
    monkeypatch.setattr(compat, "all_to_all_single", lambda x, *_: x.clone())
    monkeypatch.setattr(compat, "wait_tensor", lambda x: x)
    computed = []

    def remember(graph, _):
        computed.extend(node.name for node in graph.graph.output_node().args[0] if node.op == "call_function")
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=remember, partition_fn=min_cut_rematerialization_partition)
    sizes = SIZES | {"num_heads": 4, "num_kv_heads": 2, "nsa": replace(NSA, backend="triton")}
    model = Transformer(TransformerConfig(**sizes), recompute="block")
    model.init_weights(0)
    model.parallel = context_parallel.ContextParallel(size=ranks)
    positions, x = torch.arange(16), torch.randn(16 // ranks, sizes["hidden_size"], requires_grad=True)
    context = model.contexts(positions, cu_seqlens([16]), 16)[0]
    torch.compile(model.layers[0], backend=backend, fullgraph=True, dynamic=False)(x, context, False)
    assert len(computed) == 1  # the block's own output
