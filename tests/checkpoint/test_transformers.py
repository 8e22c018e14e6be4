"""Dense models and exports beside the implementations of `transformers`, which are taken as the truth."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from support.dense import LLAMA3, SOURCES, YARN, write_source

from nsa_lightning.checkpoint.atomic import save_file
from nsa_lightning.checkpoint.convert import RopeChange, convert
from nsa_lightning.checkpoint.directory import read_config
from nsa_lightning.checkpoint.export import export
from nsa_lightning.checkpoint.weights import WeightFiles, load_weights
from nsa_lightning.data.tokenizer import load_tokenizer
from nsa_lightning.generation.generate import Generation, StopConfig
from nsa_lightning.generation.sampling import Sampler, SamplingConfig
from nsa_lightning.generation.text_model import open_text_model
from nsa_lightning.model import Transformer
from nsa_lightning.model.attention.nsa import NSAttention
from nsa_lightning.model.cached import decode
from nsa_lightning.model.config import NSALayerConfig
from nsa_lightning.model.rope import RotaryEmbedding, rotary_frequencies

transformers = pytest.importorskip("transformers")
from nsa_lightning.checkpoint import hugging_face_model  # noqa: E402 (imports transformers)
from nsa_lightning.checkpoint.hugging_face_model import NSACache  # noqa: E402

NSA = NSALayerConfig(
    kv_sharing="separate",
    branch_start="independent",
    compress_block_size=4,
    compress_stride=2,
    select_block_size=8,
    num_selected_blocks=4,
    window_size=6,
)
DENSE_LAYERS = {"mistral_sliding": ["sliding"], "mistral_default": ["sliding"], "qwen2_mixed": ["full", "sliding"]}
"""Attention of sources with a window; the others' is full."""


def make(source, output, attention, nsa=NSA, rope=None):
    convert(source, output, attention, nsa, rope or RopeChange(), seq_len=64, sample=None, sample_tokens=0)
    return output


def decoder(directory, *, selection_only=False):
    """The converted model, with its gates as they are or at exactly 0, 1, 0."""
    model = Transformer(read_config(directory, "test").config)
    load_weights(model, WeightFiles(directory, "test"))
    for layer in model.layers:
        if selection_only and isinstance(layer.self_attn, NSAttention):
            shut, opened = -float("inf"), float("inf")
            layer.self_attn.branch_gate.bias.data = torch.tensor([shut, opened, shut]).repeat(model.config.num_heads)
    return model


@torch.no_grad()
def own_logits(model, tokens, first_position=0):
    positions = torch.arange(len(tokens)) + first_position
    offsets = torch.tensor([0, len(tokens)], dtype=torch.int32)
    return model(tokens, positions, offsets, len(tokens)).hidden @ model.output_embedding.T


@torch.no_grad()
def true_logits(directory, tokens, first_position=0):
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    positions = torch.arange(len(tokens)) + first_position
    return model.eval()(tokens[None], position_ids=positions[None]).logits[0]


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(300, (70,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _modules_of_directories_stay_here(tmp_path, monkeypatch):
    """`trust_remote_code` copies a directory's module."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", SOURCES)
def test_dense_layers_are_the_source(tmp_path, tokens, name):
    """Also at long positions, where RoPE scaling shows."""
    source = write_source(tmp_path / "source", name)
    model = decoder(make(source, tmp_path / "made", DENSE_LAYERS.get(name, ["full"])))
    assert_same(own_logits(model, tokens), true_logits(source, tokens))
    far = own_logits(model, tokens, 50_000), true_logits(source, tokens, 50_000)
    torch.testing.assert_close(*far, rtol=2e-3, atol=2e-3)


SPELLINGS = {
    "scaling beside parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
    "and theta": {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": YARN, "rope_theta": 5e5},
    "theta of the parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 5e5},
    "theta beside them": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    "empty scaling": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {}},
    "default scaling": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "default"}},
    "both types": {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
    "original length twice": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "original length beside": {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32},
    "none": {},
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_of_several_spellings_of_a_rotary_embedding_that_counts_which_transformers_takes(tmp_path, family, name):
    write_source(tmp_path / "source", family, **{"rope_theta": None, "rope_parameters": None} | SPELLINGS[name])
    if SPELLINGS[name].get("rope_theta") is None:
        raw = json.loads((tmp_path / "source" / "config.json").read_text())
        (tmp_path / "source" / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    config = read_config(tmp_path / "source", "test").config
    rotary = RotaryEmbedding(config.rope, config.query_head_dim)
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path / "source")
        )
    true = type(shell.model.rotary_emb)(shell.config)
    torch.testing.assert_close(rotary_frequencies(config.rope, config.query_head_dim), true.inv_freq)
    assert rotary.factor == pytest.approx(true.attention_scaling)


@pytest.mark.parametrize("sharing", ["separate", "shared"])
@pytest.mark.parametrize("compression", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("name", ["llama_tied", "mistral", "qwen2_yarn", "qwen3"])
def test_the_selected_branch_alone_is_the_source_up_to_what_it_reads(tmp_path, tokens, name, compression, sharing):
    nsa = replace(NSA, compression=compression, kv_sharing=sharing)
    source = write_source(tmp_path / "source", name)
    model = decoder(make(source, tmp_path / "made", ["nsa", "full"], nsa), selection_only=True)
    n = NSA.selected_tokens
    own, true = own_logits(model, tokens), true_logits(source, tokens)
    assert_same(own[:n], true[:n])
    assert not torch.allclose(own[n:], true[n:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        (RopeChange(scaling="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (RopeChange(scaling="yarn", factor=4.0), YARN),
        (RopeChange(scaling="llama3", factor=8.0), LLAMA3),
        (RopeChange(theta=3e6), None),
    ],
    ids=["linear", "yarn", "llama3", "theta"],
)
def test_a_changed_rope_is_that_of_transformers_at_long_positions(tmp_path, tokens, change, scaling):
    source = write_source(tmp_path / "source", max_position_embeddings=64)
    truth = write_source(tmp_path / "truth", rope_theta=change.theta or 1e4, rope_scaling=scaling)
    model = decoder(make(source, tmp_path / "made", ["full"], rope=change))
    far = own_logits(model, tokens, 5_000), true_logits(truth, tokens, 5_000)
    torch.testing.assert_close(*far, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(far[1], true_logits(source, tokens, 5_000), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "qwen2_mixed"])
def test_a_dense_export_is_loaded_without_our_code_and_is_the_source(tmp_path, tokens, name):
    source = write_source(tmp_path / "source", name)
    made = make(source, tmp_path / "made", DENSE_LAYERS.get(name, ["full"]))
    export(made, tmp_path / "back", None, None)
    assert not (tmp_path / "back" / "modeling_nsa.py").exists()
    assert torch.equal(true_logits(tmp_path / "back", tokens), true_logits(source, tokens))


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen2_mixed"])
def test_an_exported_nsa_model_computes_the_same_packed_or_padded(tmp_path, tokens, name):
    made = make(write_source(tmp_path / "source", name), tmp_path / "made", ["full", "nsa"])
    export(made, tmp_path / "back", None, None)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    whole = own_logits(decoder(made), tokens)
    first = own_logits(decoder(made), tokens[:40])
    batch, mask = torch.stack([tokens, torch.cat([tokens.new_zeros(30), tokens[:40]])]), torch.ones(2, 70)
    mask[1, :30] = 0
    with torch.no_grad():
        logits = model(batch, attention_mask=mask).logits
    assert_same(logits[0], whole)
    assert_same(logits[1, 30:], first)


@pytest.fixture
def generating(tmp_path):
    """An exported NSA model with a full layer, and its directory."""
    source = write_source(tmp_path / "source", "qwen3", tokenizer=True)
    made = make(source, tmp_path / "made", ["nsa", "full"])
    return transformers.AutoModelForCausalLM.from_pretrained(made, trust_remote_code=True), made


OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_an_exported_nsa_model_generates_what_the_decoder_ranks_first(generating, tokens, monkeypatch):
    model, made = generating
    steps = []
    monkeypatch.setattr(hugging_face_model, "decode", lambda *given: steps.append(given[1].shape) or decode(*given))
    text = tokens[:40]
    generated = model.generate(text[None], max_new_tokens=12, **OPTIONS)[0]
    assert steps == [(1,)] * 11  # none reads the text again
    for _ in range(12):
        text = torch.cat([text, own_logits(decoder(made), text)[-1].argmax()[None]])
    assert torch.equal(generated, text)


def test_rows_of_a_padded_batch_and_samples_are_generated_as_without_a_cache(generating, tokens):
    model, _ = generating
    batch, mask = torch.stack([tokens, torch.cat([tokens.new_zeros(30), tokens[:40]])]), torch.ones(2, 70)
    mask[1, :30] = 0
    for options in (
        OPTIONS,
        OPTIONS | {"do_sample": True, "num_return_sequences": 2},
        OPTIONS | {"num_beams": 2},  # beams change places: no cache
    ):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            made = model.generate(batch, attention_mask=mask, max_new_tokens=9, use_cache=use_cache, **options)
            texts.append(made)
        assert torch.equal(*texts)


def test_a_cache_goes_on_with_the_next_turn_of_a_conversation(generating, tokens):
    model, _ = generating
    cache = NSACache(model, 1, 100)
    first = model.generate(tokens[None, :40], max_new_tokens=5, past_key_values=cache, **OPTIONS)
    second = torch.cat([first, tokens[None, 40:]], 1)
    expected = model.generate(second, max_new_tokens=5, **OPTIONS)
    assert torch.equal(model.generate(second, max_new_tokens=5, past_key_values=cache, **OPTIONS), expected)
    assert cache.get_seq_length() == 79
    with pytest.raises(ValueError, match="num_beams must be 1 with a cache of NSACache"):
        model.generate(second, max_new_tokens=5, past_key_values=NSACache(model, 2, 100), num_beams=2, **OPTIONS)


def test_generate_of_transformers_and_of_ours_give_the_same_tokens(generating, tokens):
    model, made = generating
    opened = open_text_model(made, None, RopeChange())
    prompt = tokens[:33].tolist()
    device = torch.device("cpu")
    loop = Generation(
        opened.decoder(1, 60, device, torch.float32, False),
        Sampler(SamplingConfig(temperature=0), 1, 300, device),
        opened.tokenizer,
        (),
        StopConfig(max_new_tokens=20),
    )
    *_, last = loop.run([prompt])
    generated = model.generate(tokens[None, :33], max_new_tokens=20, **OPTIONS)[0, 33:].tolist()
    assert last.tokens == generated


def test_a_loss_of_an_exported_model_is_the_mean_over_next_tokens(tmp_path, tokens):
    made = make(write_source(tmp_path / "source"), tmp_path / "made", ["nsa"])
    model = transformers.AutoModelForCausalLM.from_pretrained(made, trust_remote_code=True)
    with torch.no_grad():
        loss = model(tokens[None], labels=tokens[None]).loss
    expected = torch.nn.functional.cross_entropy(own_logits(decoder(made), tokens)[:-1], tokens[1:])
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("place", ["file", "directory", "run"])
def test_an_export_stops_and_pads_with_transformers_as_it_stops_here(tmp_path, place):
    """Also where nothing beside the tokenizer.json names the end of text, as in a run of `nsa fit`."""
    source = write_source(tmp_path / "source", "llama_tied", tokenizer=True, eos_token_id=None, bos_token_id=None)
    checkpoint, given = source, source / "tokenizer.json" if place == "file" else source
    if place == "run":
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        load_tokenizer(str(source), "e").save(tmp_path / "run" / "tokenizer.json")  # what fit was told
        files = WeightFiles(source, "source")
        state = {name: files.read(name) for name in files.shapes}
        settings = {"transformer": asdict(read_config(source, "source").config)}
        content = {"state_dict": state | {"model.lm_head.weight": state["model.embed_tokens.weight"]}}
        content |= {"pytorch-lightning_version": "2", "hyper_parameters": settings}
        checkpoint, given = tmp_path / "run" / "checkpoints" / "last.ckpt", None
        save_file(content, checkpoint)
    export(checkpoint, tmp_path / "out", None, given)
    own = open_text_model(tmp_path / "out", None, RopeChange())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    end = "e" if place == "run" else "<|endoftext|>"
    assert tokenizer.eos_token == tokenizer.pad_token == end == own.tokenizer.end_of_text
    ends = model.generation_config.eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == own.end_tokens
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    padded = tokenizer(["some", "some text of a few words"], padding=True, return_tensors="pt")
    assert padded.input_ids.shape[0] == 2
    assert not padded.attention_mask.all()


def test_what_an_export_names_already_stays(tmp_path):
    source = write_source(tmp_path / "source", tokenizer=True, eos_token_id=[5, 6], pad_token_id=7)
    chat = {
        "pad_token": "f",
        "chat_template": "{{ messages[0].content }}",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(chat | {"eos_token": "e"}))
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": True}))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    files = export(source, tmp_path / "out", None, None).tokenizer_files
    assert "additional_chat_templates/tool_use.jinja" in files
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("e", "f")
    assert model.config.pad_token_id == 7
    assert model.generation_config.temperature == 0.5
    own = open_text_model(tmp_path / "out", None, RopeChange())
    assert set(model.generation_config.eos_token_id) == {5, 6, tokenizer.eos_token_id} == own.end_tokens
