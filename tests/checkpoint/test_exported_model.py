"""An exported NSA model is a model of `transformers`: what cannot work says so, nothing is ignored silently."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.dense import write_source
from support.training import NSA

from nsa_lightning.checkpoint.convert import RopeChange, convert
from nsa_lightning.checkpoint.directory import read_config
from nsa_lightning.checkpoint.weights import INDEX, WeightFiles
from nsa_lightning.model.transformer import Transformer

transformers = pytest.importorskip("transformers")
from nsa_lightning.checkpoint.hugging_face_model import NSACache, NSAForCausalLM  # noqa: E402 (imports transformers)

OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["llama", "llama_tied"])
def made(request, tmp_path_factory):
    """A converted model with an NSA and a full layer."""
    root = tmp_path_factory.mktemp("exported")
    source = write_source(root / "source", request.param, tokenizer=True)
    convert(source, root / "made", ["nsa", "full"], NSA, RopeChange(), 64, None, 0)
    return root / "made"


@pytest.fixture
def model(made):
    return NSAForCausalLM.from_pretrained(made).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(300, (2, 70), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunks", [[70], [1, 69], [40, 30], [33, 1, 36], [69, 1], [7] * 10])
@pytest.mark.parametrize("padding", [0, 9, 69])
@torch.no_grad()
def test_a_cache_takes_a_prompt_in_any_pieces_and_gives_every_logit(model, tokens, chunks, padding):
    """With padding on the left of the second row; each piece of the first row has tokens."""
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[1, :padding] = 0
    whole, cache, seen, found = logits(model, tokens, attention_mask=mask, use_cache=False), None, 0, []
    for size in chunks:
        part = tokens[:, seen : seen + size]
        output = model(part, attention_mask=mask[:, : seen + size], past_key_values=cache, use_cache=True)
        seen, cache = seen + size, output.past_key_values
        found.append(output.logits)
    assert cache.get_seq_length() == 70
    real = mask.bool()
    same(torch.cat(found, 1)[real], whole[real])


@torch.no_grad()
def test_the_usual_loop_with_a_cache_is_what_generate_gives(model, tokens):
    prompt = tokens[:1, :40]
    expected = model.generate(prompt, max_new_tokens=8, use_cache=False, **OPTIONS)[0, 40:].tolist()
    for use_cache in (True, None):  # asked for or not
        current, cache, found = prompt, None, []
        for _ in range(8):
            output = model(current, past_key_values=cache, use_cache=use_cache)
            cache, current = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            found.append(current.item())
        assert found == expected
    assert model.generate(prompt, max_new_tokens=8, **OPTIONS)[0, 40:].tolist() == expected


def test_a_cache_is_returned_where_gradients_are_wanted_too_and_does_not_cost_them(model, tokens):
    output = model(tokens, labels=tokens, use_cache=True)
    output.loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    following = logits(model, tokens[:, :1], past_key_values=output.past_key_values)
    same(following[:, 0], logits(model, torch.cat([tokens, tokens[:, :1]], 1))[:, -1])
    assert model.train()(tokens).past_key_values is None
    model.eval().config.use_cache = False
    assert model(tokens).past_key_values is None


@torch.no_grad()
def test_a_copy_of_a_cache_goes_on_by_itself(model, tokens):
    prefix = model(tokens[:, :40], use_cache=True).past_key_values
    for rest in (tokens[:, 40:], tokens[:, 40:].flip(1)):
        expected = logits(model, torch.cat([tokens[:, :40], rest], 1))[:, 40:]
        same(logits(model, rest, past_key_values=copy.deepcopy(prefix)), expected)


@torch.no_grad()
def test_a_row_without_new_tokens_stays_as_it_is(model, tokens):
    cache = model(tokens[:, :40], use_cache=True).past_key_values
    mask = torch.ones(2, 41, dtype=torch.int64)
    mask[1, 40] = 0
    model(tokens[:, 40:41], attention_mask=mask, past_key_values=cache)
    following = model(tokens[:, 41:42], past_key_values=cache).logits[:, 0]
    expected = [tokens[0, :42], torch.cat([tokens[1, :40], tokens[1, 41:42]])]
    for row, text in enumerate(expected):
        same(following[row], logits(model, text[None])[0, -1])


def test_documents_that_position_ids_begin_are_apart(model, tokens):
    first, second = tokens[:, :45], tokens[:, 45:]
    positions = torch.cat([torch.arange(45), torch.arange(25)])
    for given in (positions[None], positions.repeat(2, 1)):
        together = logits(model, tokens, position_ids=given)
        same(together, torch.cat([logits(model, first), logits(model, second)], 1))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    padded = torch.stack([(mask[0].cumsum(0) - 1).clamp(min=0), torch.arange(70)])
    same(logits(model, tokens, attention_mask=mask, position_ids=padded)[0, 5:], logits(model, tokens[:1, 5:])[0])
    same(logits(model, tokens, position_ids=torch.arange(70)[None] + 3), logits(model, tokens))
    assert model(tokens, position_ids=positions[None]).past_key_values is None


def test_positions_behind_a_cache_go_on_where_it_ends(model, tokens):
    with torch.no_grad():
        cache = model(tokens[:, :40], use_cache=True).past_key_values
        following = logits(model, tokens[:, 40:50], past_key_values=cache, position_ids=torch.arange(40, 50)[None])
        same(following, logits(model, tokens[:, :50])[:, 40:])
        with pytest.raises(
            ValueError, match="position_ids must go on behind the 50 tokens of past_key_values, got 0 to"
        ):
            model(tokens[:, 50:60], past_key_values=cache, position_ids=torch.arange(10)[None])


def test_logits_are_kept_where_they_are_asked_for(model, tokens):
    whole = logits(model, tokens)
    same(logits(model, tokens, logits_to_keep=3), whole[:, -3:])
    same(logits(model, tokens, logits_to_keep=torch.tensor([4, 60])), whole[:, [4, 60]])
    as_tuple = model(tokens, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 1


REFUSED = {
    "inputs_embeds must not be set: the model reads input_ids": {"inputs_embeds": torch.zeros(2, 70, 32)},
    "output_attentions must not be set": {"output_attentions": True},
    "output_hidden_states must not be set": {"output_hidden_states": True},
    "attention_mask must be .B, L., 0 at padding, .2, 70. here, got .2, 1, 70, 70.": {
        "attention_mask": torch.ones(2, 1, 70, 70)
    },
    "attention_mask must be 0 at the ends of a row alone": {
        "attention_mask": torch.tensor([[1] * 30 + [0] + [1] * 39] * 2)
    },
    "position_ids must count up, or restart at 0": {"position_ids": torch.tensor([[*range(30), *range(50, 90)]])},
    "position_ids must be .B, L.": {"position_ids": torch.arange(70)},
    "use_cache must be False where position_ids begin several": {
        "position_ids": torch.tensor([[*range(30), *range(40)]]),
        "use_cache": True,
    },
    "cu_seq_lens_q must not be set, .*: give position_ids": {"cu_seq_lens_q": torch.tensor([0, 70, 140])},
    "head_mask must not be set": {"head_mask": torch.ones(1)},
    "past_key_values must be an NSACache, .* got DynamicCache": {"past_key_values": transformers.DynamicCache()},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_model_cannot_do_is_refused_in_words(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model(tokens, **REFUSED[message])


def test_what_the_model_cannot_do_is_refused_in_generate_and_in_its_config(model, made, tokens):
    with pytest.raises(ValueError, match="output_hidden_states must not be set"):
        model.generate(tokens, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True, **OPTIONS)
    padded = torch.ones_like(tokens)
    padded[0, -3:] = 0
    with pytest.raises(ValueError, match="attention_mask must be 0 on the left alone to generate"):
        model.generate(tokens, attention_mask=padded, max_new_tokens=2, **OPTIONS)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2, **OPTIONS)
    configured = NSAForCausalLM.from_pretrained(made, output_hidden_states=True)
    with pytest.raises(ValueError, match="output_hidden_states must not be set"):
        configured(tokens)
    with pytest.raises(ValueError, match="past_key_values must have the rows of input_ids, got 1 for 2"):
        model.generate(tokens, max_new_tokens=2, past_key_values=NSACache(model, 1), **OPTIONS)


@pytest.mark.parametrize("size", [316, 290])
def test_a_resized_vocabulary_is_one_everywhere_and_is_saved_and_read_again(model, tokens, tmp_path, size):
    ids, before = tokens % 290, logits(model, tokens % 290)
    model.resize_token_embeddings(size)
    assert (model.config.vocab_size, model.config.transformer["vocab_size"], model.model.config.vocab_size) == (
        size,
    ) * 3
    after = model(ids, labels=ids)
    assert after.logits.shape[-1] == size
    same(after.logits[..., :290], before[..., :290])
    after.loss.backward()
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_nsa.py").is_file()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    same(logits(again, ids), after.logits.detach())
    saved = read_config(tmp_path / "saved", "saved").config
    assert saved.vocab_size == size
    with torch.device("meta"):
        own = Transformer(saved)
    WeightFiles(tmp_path / "saved", "saved").check(own)
    tied = model.config.tie_word_embeddings
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == saved.tie_embeddings


def test_rows_that_a_resize_adds_without_the_mean_are_as_large_as_the_others(model):
    model.resize_token_embeddings(400, mean_resizing=False)
    weight = model.get_input_embeddings().weight.detach()
    assert weight[300:].std() == pytest.approx(32**-0.5, rel=0.1)


def test_a_model_of_the_config_alone_starts_as_the_decoder_does(made):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(made))
    down = model.model.layers[0].mlp.down_proj.weight.detach()
    assert down.std() == pytest.approx((4 * 48) ** -0.5, rel=0.1)
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    assert model.model.layers[0].self_attn.k_summary.in_weight.std() > 0


def test_what_a_file_lacks_starts_as_a_model_from_scratch(made, tmp_path):
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = "model.layers.1.mlp.gate_proj.weight"
    for file in tmp_path.glob("*.safetensors"):
        save_file({key: x for key, x in load_file(file).items() if key != name}, file, {"format": "pt"})
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"][name]
    (tmp_path / INDEX).write_text(json.dumps(index))
    model = NSAForCausalLM.from_pretrained(tmp_path)
    assert model.get_parameter(name).detach().std() == pytest.approx(32**-0.5, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_another_dtype_computes_and_generates_in_it(made, tokens, dtype):
    model = NSAForCausalLM.from_pretrained(made, dtype=dtype).eval()
    assert logits(model, tokens).dtype == dtype
    difference = (logits(model, tokens).float() - logits(NSAForCausalLM.from_pretrained(made), tokens)).abs()
    assert difference.median() < 0.05  # now and then another block is selected
    assert model.generate(tokens, max_new_tokens=5, **OPTIONS).shape == (2, 75)


@torch.no_grad()
def test_a_model_generates_under_autocast(model, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        found = model.generate(tokens, max_new_tokens=5, **OPTIONS)
        step = model(tokens, use_cache=True).logits[:, -1]
    assert found.shape == (2, 75)
    assert (step.float() - logits(model, tokens)[:, -1]).abs().median() < 0.05


def test_offloaded_layers_are_brought_to_every_step(made, tokens, tmp_path):
    pytest.importorskip("accelerate")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "lm_head", "model.rotary"), "cpu")
    places["model.layers.0"] = "disk"
    offloaded = NSAForCausalLM.from_pretrained(made, device_map=places, offload_folder=str(tmp_path))
    whole = NSAForCausalLM.from_pretrained(made)
    same(logits(offloaded, tokens), logits(whole, tokens))
    assert torch.equal(
        offloaded.generate(tokens, max_new_tokens=5, **OPTIONS), whole.generate(tokens, max_new_tokens=5, **OPTIONS)
    )


def test_parameters_without_numbers_are_brought_by_a_call_of_their_module(made, tokens):
    """As hooks of offloaded modules bring them, which act on calls alone."""
    model = NSAForCausalLM.from_pretrained(made).eval()
    expected = model.generate(tokens, max_new_tokens=5, **OPTIONS)
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            offload(module)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, **OPTIONS), expected)


def offload(module):
    """Keep the parameters of a module elsewhere while it is not called."""
    kept = dict(module.named_parameters(recurse=False))

    def place(parameters):
        for name, parameter in parameters.items():
            module._parameters[name] = parameter

    away = {name: torch.nn.Parameter(parameter.to("meta"), False) for name, parameter in kept.items()}
    module.register_forward_pre_hook(lambda *_: place(kept))
    module.register_forward_hook(lambda *_: place(away))
    place(away)


def test_a_saved_model_brings_what_a_process_that_knows_nothing_of_it_finds_it_by(model, made, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert settings["auto_map"]["AutoModelForCausalLM"] == "modeling_nsa.NSAForCausalLM"
    assert (tmp_path / "saved" / "modeling_nsa.py").read_bytes() == (made / "modeling_nsa.py").read_bytes()
