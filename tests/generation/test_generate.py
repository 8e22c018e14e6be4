"""The decoding loop: rows, turns and ends, with a decoder that follows a script and with a model."""

from dataclasses import replace

import pytest
import torch
from support.training import CONFIG, NSA

from nsa_lightning.data.tokenizer import train_tokenizer
from nsa_lightning.generation.decoder import Decoder
from nsa_lightning.generation.device import check_memory, use_device
from nsa_lightning.generation.generate import Generation, StopConfig
from nsa_lightning.generation.sampling import Sampler, SamplingConfig
from nsa_lightning.model.cached import Cache
from nsa_lightning.model.transformer import Transformer

VOCAB = CONFIG.vocab_size
CPU = torch.device("cpu")
GREEDY = SamplingConfig(temperature=0)
TOKENIZER = train_tokenizer(["some text of a few words\n" * 20], VOCAB)
LAYERS = {
    "nsa": {"nsa": NSA},
    "shared": {"nsa": replace(NSA, kv_sharing="shared", compress_rope="before", compression="mean")},
    "mixed": {"num_layers": 3, "attention": ["nsa", "full", "sliding"], "sliding_window": 6},
}


class Script:
    """A decoder whose sequences count on from their prompt's last token; idle rows are handed a 0."""

    def __init__(self, batch_size):
        self.batch_size, self.handed, self.ended = batch_size, [], []

    def begin(self, row, prompt):
        return self._next(prompt[-1:])[0]

    def step(self, tokens):
        self.handed.append(tokens)
        return self._next(torch.tensor(tokens))

    def end(self, row):
        self.ended.append(row)

    def _next(self, tokens):
        return torch.nn.functional.one_hot((tokens + 1) % VOCAB, VOCAB).float()


def answers(decoder, prompts, stop, *, end_tokens=(), sampling=GREEDY):
    """Tokens, text and finish of every prompt, and the loop."""
    sampler = Sampler(sampling, decoder.batch_size, VOCAB, CPU)
    loop = Generation(decoder, sampler, TOKENIZER, end_tokens, stop)
    found = [["", None, []] for _ in prompts]
    for piece in loop.run(prompts):
        assert found[piece.prompt][1] is None
        found[piece.prompt][0] += piece.text
        found[piece.prompt][1:] = piece.finish, list(piece.tokens)
    return [(tokens, finish, text) for text, finish, tokens in found], loop


def test_a_row_takes_the_next_prompt_as_its_answer_ends():
    decoder = Script(2)
    ends = [49, 59, 69]
    found, loop = answers(decoder, [[40], [57], [66], [68]], StopConfig(max_new_tokens=5), end_tokens=ends)
    assert [(tokens, finish) for tokens, finish, _ in found] == [
        ([41, 42, 43, 44, 45], "length"),
        ([58], "end"),
        ([67, 68], "end"),
        ([], "end"),
    ]
    assert decoder.handed == [[41, 58], [42, 67], [43, 68], [44, 0]]
    assert decoder.ended == [1, 1, 1, 0]
    assert (loop.speed.prefill_tokens, loop.speed.decode_tokens) == (4, 7)


def test_a_stop_string_across_tokens_ends_an_answer_without_it():
    first = TOKENIZER.encode_prompt("a", start=False)[0]  # tokens of single bytes follow each other: b, c, d, …
    found, _ = answers(Script(1), [[first]], StopConfig(max_new_tokens=9, stop=["de", "zz"]))
    ((tokens, finish, text),) = found
    assert (text, finish) == ("bc", "stop")
    assert TOKENIZER.decode(tokens) == "bcde"


@pytest.fixture(scope="module", params=LAYERS)
def model(request):
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, **LAYERS[request.param])).requires_grad_(False)
    for parameter in model.parameters():  # summaries and gates too
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def test_greedy_answers_are_what_the_model_ranks_first(model):
    (prompt,) = prompts_of(50)
    ((tokens, _, text),), _ = answers(Decoder(model, 1, 90, True), [prompt], StopConfig(max_new_tokens=40))
    whole = torch.tensor([*prompt, *tokens])
    offsets = torch.tensor([0, len(whole)], dtype=torch.int32)
    hidden = model(whole, torch.arange(len(whole)), offsets, len(whole)).hidden
    assert (hidden @ model.output_embedding.T)[49:-1].argmax(-1).tolist() == tokens
    assert len(set(tokens)) > 3
    assert TOKENIZER.decode([*prompt, *tokens]).endswith(text)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(repetition_penalty=1.2)], ids=["greedy", "sampled"])
def test_answers_of_a_batch_are_those_of_single_prompts(model, sampling):
    prompts = prompts_of(3, 41, 16, 1, 70)
    stop = StopConfig(max_new_tokens=20)
    ends = range(0, VOCAB, 25)
    singly = [
        answers(Decoder(model, 1, 95, False), [p], stop, end_tokens=ends, sampling=sampling)[0][0] for p in prompts
    ]
    together, _ = answers(Decoder(model, 2, 95, False), prompts, stop, end_tokens=ends, sampling=sampling)
    assert together == singly
    assert len({len(tokens) for tokens, *_ in singly}) > 1


def test_rows_that_idle_longer_than_the_cache_is_do_not_disturb_the_others(model):
    (prompt,) = prompts_of(5)
    stop, sampler = StopConfig(max_new_tokens=11), Sampler(GREEDY, 3, VOCAB, CPU)
    loop = Generation(Decoder(model, 3, 16, False), sampler, TOKENIZER, (), stop)
    told = [
        "".join(piece.text for piece in loop.run(prompts))
        for prompts in ([[1], [2], [3]], [prompt], [prompt], [prompt])
    ]
    assert told[1] == told[2] == told[3] == answers(Decoder(model, 1, 16, False), [prompt], stop)[0][0][2]


def test_a_row_that_has_ended_is_as_short_as_the_others(model):
    """A step on a CPU reads as many slots as the longest sequence has tokens."""
    decoder = Decoder(model, 2, 95, False)
    for row, prompt in enumerate(prompts_of(70, 3)):
        decoder.begin(row, torch.tensor(prompt))
    decoder.end(0)
    assert decoder.step([0, 1]).isfinite().all()
    assert decoder.cache.lengths.tolist() == decoder.cache.host_lengths == [1, 4]


def test_a_cache_that_does_not_fit_says_how_many_tokens_would(monkeypatch):
    monkeypatch.setattr("nsa_lightning.generation.device.free_memory", lambda device: 2_000_000)
    check_memory(CONFIG, 2, 1000, CPU, torch.float32)
    with pytest.raises(ValueError, match=r"takes 0.0\d GB, .* 0.00 GB are free, enough for 2 x \d+") as caught:
        check_memory(CONFIG, 2, 100_000, CPU, torch.float32)
    fitting = int(str(caught.value).split()[-1])
    check_memory(CONFIG, 2, fitting, CPU, torch.float32)
    with pytest.raises(ValueError, match="enough for"):
        check_memory(CONFIG, 2, fitting + NSA.select_block_size, CPU, torch.float32)
    assert Cache.bytes_needed(CONFIG, 2, fitting, torch.float32) > 1_000_000


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99", "cpuu"])
def test_a_device_that_cannot_be_used_is_named(name):
    with pytest.raises(ValueError, match=f"device must be .*, got {name}"):
        use_device(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"), ({"stop": ["a", ""]}, "no empty string")],
)
def test_a_limit_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        StopConfig(**settings)
