"""The estimate against what PyTorch really allocates; nothing is allocated for it."""

import re
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from nsa_cli.memory_settings import step_settings
from support.dense import write_source
from support.packings import cu_seqlens
from support.training import CONFIG as TINY

from nsa_lightning.checkpoint.directory import read_config
from nsa_lightning.memory import meter as meters
from nsa_lightning.memory.estimate import estimate_memory
from nsa_lightning.memory.meter import PARAMETERS, MemoryMeter, Place
from nsa_lightning.memory.settings import StepSettings
from nsa_lightning.memory.sharded import shard_shape
from nsa_lightning.memory.simulated_gpu import DEVICE, _walk, simulated_gpu
from nsa_lightning.memory.step import GRADIENTS, OPTIMIZER_STATE, SimulatedStep, allocate
from nsa_lightning.model import loss
from nsa_lightning.model.context_parallel import ContextParallel
from nsa_lightning.model.loss import chunked_cross_entropy, summed_cross_entropy
from nsa_lightning.model.transformer import Transformer
from nsa_lightning.training.distillation import Distillation
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.optimizer import parameter_groups
from nsa_lightning.training.sharding import shard_dimension
from nsa_lightning.training.strategy import FSDP2Strategy

TRAINER = {
    "strategy": "auto", "precision": "bf16-mixed", "devices": 1, "num_nodes": 1,
    "accumulate_grad_batches": 1, "logger": False,
}  # fmt: skip
T = 96
CONFIG = replace(TINY, nsa=replace(TINY.nsa, select_block_size=16))  # the least that the kernels take


def settings(world_size=1, **changes):
    fields = {name: changes.pop(name) for name in list(changes) if name not in TRAINER}
    return replace(step_settings(TRAINER | changes, T, 1, world_size), **fields)


@pytest.fixture
def _every_byte(monkeypatch):
    """Sizes are not rounded up to what the GPU's allocator hands out."""
    monkeypatch.setattr(meters, "GRANULE", 1)


def forward_and_backward(model, length=40):
    tokens, positions = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.int64)
    output = model(tokens, positions, cu_seqlens([length]), length)
    nats = summed_cross_entropy(output.hidden, model.output_embedding, tokens, -100)
    del output
    nats.backward()


def most_allocated(model):
    """Bytes that PyTorch's own allocator handed out at once, in a step whose kernels Triton interprets."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        patch.object(torch.Tensor, "is_cuda", True),
        patch.object(loss, "fused_walk", lambda _: _walk),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        forward_and_backward(model)
    live = most = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.slow
@pytest.mark.usefixtures("_every_byte")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
def test_a_simulated_step_allocates_to_the_byte_what_a_real_one_does(monkeypatch):
    """The peak is a block's: the loss holds few logits at once, and is not compiled."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 8 * CONFIG.vocab_size)
    triton = pytest.importorskip("triton")
    config = replace(CONFIG, num_layers=1)
    real = most_allocated(Transformer(config, "block"))
    with torch.device("meta"):
        model = Transformer(config, "block")
    meter, norm = MemoryMeter(DEVICE), F.rms_norm
    with simulated_gpu(), patch.object(triton.knobs.runtime, "interpret", True), patch.object(F, "rms_norm", norm):
        allocate(model, torch.float32, lambda parameter: parameter.shape)
        for parameter in model.parameters():
            meter.ignore(parameter)
        with meter:
            forward_and_backward(model)
    assert meter.peaks[Place("")].total == real > 1e5


@pytest.mark.usefixtures("_every_byte")
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params: torch.optim.AdamW(params, fused=True),
        torch.optim.AdamW,
        lambda params: torch.optim.SGD(params, momentum=0.9),
        torch.optim.SGD,
    ],
)
def test_weights_gradients_and_optimizer_state_are_those_of_a_real_model(optimizer):
    estimate = estimate_memory(LanguageModel(CONFIG, optimizer=optimizer), settings())
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    real = optimizer(parameter_groups(model))
    real.step()
    state = [value for entry in real.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    kinds = estimate.peaks[Place("optimizer step")].kinds
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert kinds[PARAMETERS] == kinds[GRADIENTS] == weights > 0
    assert kinds.get(OPTIMIZER_STATE, 0) == sum(value.nbytes for value in state)
    assert estimate.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_rank_holds_the_largest_shard(ranks):
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        shard = parameter.chunk(ranks, shard_dimension(parameter, ranks))[0]
        assert shard_shape(parameter, ranks) == shard.shape


VARIANTS = [
    {"strategy": "ddp", "world_size": 2},
    {"strategy": "fsdp2", "world_size": 4, "cpu_offload": True, "context_parallel_size": 2},
    {"strategy": "fsdp2", "world_size": 4, "reshard_after_forward": False, "accumulates": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_many_blocks_are_as_a_simulation_of_all_of_them_says(variant):
    attention = ["nsa", "full"] if variant["strategy"] == "ddp" else ["nsa"]
    edge = 1 + len(attention)
    num_layers = 2 * edge + 2 * len(attention)  # the fewest that are not simulated all
    config = replace(CONFIG, num_layers=num_layers, num_kv_heads=2, attention=attention)
    module = LanguageModel(config, activation_checkpointing="selective")
    estimate = estimate_memory(module, settings(**variant))
    whole = SimulatedStep(module, settings(**variant), num_layers, edge).run()
    assert estimate.worst[1].total == max(peak.total for peak in whole.peaks.values())
    assert {place: whole.peaks[place] for place in estimate.peaks} == estimate.peaks
    assert estimate.host == whole.host
    assert (estimate.host > 0) == settings(**variant).cpu_offload


@pytest.mark.slow
def test_each_way_to_save_memory_saves_some():
    def most(recompute="none", **variant):
        module = LanguageModel(replace(CONFIG, **sizes), activation_checkpointing=recompute)
        estimate = estimate_memory(module, settings(**variant))
        return estimate.worst[1].total if sizes else estimate.by_stage["forward"]

    sizes = {}
    assert most("block", seq_len=4096) < most("selective", seq_len=4096) < most(seq_len=4096)
    sizes, sharded = (
        {"hidden_size": 384, "intermediate_size": 2048, "num_layers": 4, "attention": ["full"]},
        {"strategy": "fsdp2", "world_size": 4},
    )
    assert most(**sharded, cpu_offload=True) < most(**sharded) < most(**sharded, reshard_after_forward=False)
    assert most(**sharded) < most() < most(strategy="ddp", world_size=4)


def test_ranks_that_share_a_batch_hold_their_part_of_its_tokens_and_what_they_exchange():
    """Outside of attention as with a batch of that part; in it a little more, for the batch's layout is whole."""
    module = LanguageModel(replace(CONFIG, num_kv_heads=2), activation_checkpointing="selective")
    sharded = {"strategy": "fsdp2", "world_size": 4}
    whole, shared, part = (
        estimate_memory(module, settings(**sharded, **variant)).peaks[Place("loss")]
        for variant in ({"seq_len": 4096}, {"seq_len": 4096, "context_parallel_size": 2}, {"seq_len": 2048})
    )
    for kind in ("feed-forward", "logits and loss", PARAMETERS, OPTIMIZER_STATE):
        assert shared.kinds.get(kind) == part.kinds.get(kind)
    assert part.kinds["attention"] <= shared.kinds["attention"] < whole.kinds["attention"]
    assert part.total < shared.total < whole.total


def test_an_exchange_holds_what_is_sent_until_the_last_part_is_received():
    meter, parallel = MemoryMeter(DEVICE), ContextParallel(size=2)
    with simulated_gpu(), meter:
        q, k = torch.empty(64, 4, 128), torch.empty(64, 2, 128)  # 128 KiB and 64 KiB
        received = parallel.to_heads(q, k)
    assert [x.shape for x in received] == [(128, 2, 128), (128, 1, 128)]
    assert meter.peaks[Place("")].total == 3 * (128 + 64) * 2**10  # before, in order for sending, and received
    assert meter.total == 2 * (128 + 64) * 2**10


@pytest.mark.usefixtures("_every_byte")
def test_of_the_loss_a_chunk_of_logits_and_their_gradient_are_held():
    """Beside the gradients of the hidden states and of the output layer, which are computed along the way."""
    chunk, width, vocabulary = loss.CHUNK_LOGITS // 2**12, 8, 2**12
    meter = MemoryMeter(DEVICE)
    with simulated_gpu():
        hidden, weight = torch.empty(3 * chunk, width), torch.empty(vocabulary, width)
        targets = torch.zeros(3 * chunk, dtype=torch.int64)
        with meter:
            chunked_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets, -100)
    expected = 4 * (2 * chunk * vocabulary + hidden.numel() + weight.numel())
    assert expected <= meter.peaks[Place("")].total < 1.01 * expected


def test_attention_that_reads_its_documents_is_refused():
    for config in (TINY, replace(CONFIG, nsa=replace(CONFIG.nsa, backend="eager"))):
        with pytest.raises(ValueError, match=f"attention must run on kernels .* got nsa.backend={config.nsa.backend}"):
            estimate_memory(LanguageModel(config), settings())


def test_an_optimizer_that_reads_values_is_refused():
    with pytest.raises(ValueError, match=r"model\.optimizer must .* got Adafactor"):
        estimate_memory(LanguageModel(CONFIG, optimizer=torch.optim.Adafactor), settings())


def test_nothing_is_left_alive_after_a_step_but_what_the_next_one_finds():
    step = SimulatedStep(LanguageModel(CONFIG), settings(), 2, 3)
    step.run()
    left = {kind for kind, size in step.meter.live.items() if size}
    assert left <= {PARAMETERS, GRADIENTS, OPTIMIZER_STATE, "cuBLAS workspaces", "batch", "logits and loss"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"precision": "64-true"}, "trainer.precision must be one of .* got 64-true"),
        ({"strategy": "fsdp2", "precision": "16-mixed"}, "trainer.precision must be 32-true or bf16-mixed .* 16-mixed"),
        ({"strategy": "deepspeed"}, "trainer.strategy must be auto, ddp or fsdp2 .* got deepspeed"),
    ],
)
def test_settings_whose_memory_is_not_known_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_heads_that_cannot_be_shared_are_refused():
    shared = settings(4, strategy=FSDP2Strategy(context_parallel_size=4))
    with pytest.raises(ValueError, match="must divide the number of ranks and num_kv_heads, got 4, 4 and 1"):
        estimate_memory(LanguageModel(CONFIG), shared)


@pytest.mark.parametrize(("devices", "expected"), [(4, 8), ("4", 8), ([0, 1], 4), ("0,2,3", 6), ("auto", 2), ("1,", 2)])
def test_without_a_world_size_the_trainers_devices_count(devices, expected):
    assert step_settings(TRAINER | {"devices": devices, "num_nodes": 2}, T, 1, None).world_size == expected
    assert isinstance(settings(), StepSettings)


@pytest.mark.parametrize("devices", [0, -1, "0", "-1", "", "two", [], [0, 0], [-1], "1,1"])
def test_devices_that_cannot_be_counted_are_refused_by_name(devices):
    trainer = TRAINER | {"devices": devices, "num_nodes": 2}
    with pytest.raises(ValueError, match=re.escape(f"or auto for one, got {devices}; world_size says")):
        step_settings(trainer, T, 1, None)
    assert step_settings(trainer, T, 1, 3).world_size == 3
    with pytest.raises(ValueError, match=r"trainer.num_nodes must be at least 1, got 0"):
        step_settings(TRAINER | {"devices": 1, "num_nodes": 0}, T, 1, None)


@pytest.mark.slow
@pytest.mark.usefixtures("_every_byte")
@pytest.mark.parametrize(("strategy", "world_size"), [("auto", 1), ("fsdp2", 2)])
def test_a_teacher_and_its_loss_are_counted(strategy, world_size, tmp_path):
    directory = write_source(tmp_path / "teacher", vocab_size=CONFIG.vocab_size)
    with torch.device("meta"):
        teacher = Transformer(read_config(directory, "teacher").config)
    weights = sum(2 * p.numel() for p in teacher.parameters())  # bf16
    modules = LanguageModel(CONFIG), LanguageModel(CONFIG, distillation=Distillation(teacher=str(directory)))
    without, with_teacher = (estimate_memory(m, settings(world_size, strategy=strategy)) for m in modules)
    more = {stage: size - without.by_stage[stage] for stage, size in with_teacher.by_stage.items()}
    assert more["forward"] == pytest.approx(weights / world_size, rel=0.02)  # shards are padded
    assert more["optimizer"] >= more["forward"]
    logits, gradient = 2 * T * CONFIG.vocab_size, 4 * CONFIG.vocab_size * CONFIG.hidden_size
    assert more["loss"] > more["forward"] + logits + gradient  # the teacher's, and that of the divergence
    assert more["backward"] > more["forward"] + gradient
    assert with_teacher.worst[1].kinds["teacher"] > more["forward"]
