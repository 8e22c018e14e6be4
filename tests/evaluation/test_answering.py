"""Likelihoods and answers behind a prompt that is cached once."""

from dataclasses import replace

import pytest
import torch
from support.evaluation import completion
from support.training import CONFIG, NSA

from nsa_lightning.evaluation.answering import Answerer
from nsa_lightning.evaluation.case import Case
from nsa_lightning.evaluation.method import OwnLayers
from nsa_lightning.generation.decoder import Decoder
from nsa_lightning.generation.generate import StopConfig
from nsa_lightning.model.transformer import Transformer

TOKENIZER = completion().tokenizer
LAYERS = {
    "nsa": {"nsa": NSA},
    "shared": {"nsa": replace(NSA, kv_sharing="shared", compress_rope="before", compression="mean")},
    "mixed": {"num_layers": 3, "attention": ["nsa", "full", "sliding"], "sliding_window": 6},
}


@pytest.fixture(scope="module", params=LAYERS)
def model(request):
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, **LAYERS[request.param])).requires_grad_(False)
    for parameter in model.parameters():  # summaries and gates too
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens_of(length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocab_size, (length,), generator=generator).tolist()


def next_log_probabilities(model, tokens):
    """Of every token but the first, by one pass over all of them."""
    whole = torch.tensor(tokens)
    offsets = torch.tensor([0, len(whole)], dtype=torch.int32)
    hidden = model(whole, torch.arange(len(whole)), offsets, len(whole)).hidden
    logits = (hidden @ model.output_embedding.T).log_softmax(-1)
    return logits[:-1].gather(1, whole[1:, None])[:, 0]


def answers_of(model, cases, batch_size=2):
    answerer = Answerer(model, TOKENIZER, (), OwnLayers(model.config), batch_size, True)
    found = dict(answerer.answers(cases, StopConfig()))
    return [found[number] for number in range(len(cases))], answerer.cost


@pytest.mark.parametrize("new_tokens", [0, 6])
def test_the_likelihood_of_an_answer_is_that_of_the_whole_text(model, new_tokens):
    cases = [
        Case(prompt=tokens_of(length), answers=[], expected=tokens_of(size, 2), max_new_tokens=new_tokens)
        for length, size in ((41, 5), (7, 1), (64, 19))
    ]
    found, _ = answers_of(model, cases)
    for case, answer in zip(cases, found, strict=True):
        whole = next_log_probabilities(model, [*case.prompt, *case.expected])
        assert answer.log_probs == pytest.approx(whole[len(case.prompt) - 1 :].tolist(), abs=2e-4)


def test_an_answer_does_not_depend_on_what_was_scored_before(model):
    prompts = [tokens_of(length, length) for length in (41, 7, 64)]
    plain, _ = answers_of(model, [Case(prompt=prompt, answers=[], max_new_tokens=9) for prompt in prompts])
    scored, cost = answers_of(
        model, [Case(prompt=prompt, answers=[], max_new_tokens=9, expected=tokens_of(21)) for prompt in prompts]
    )
    assert [answer.text for answer in scored] == [answer.text for answer in plain]
    assert len({answer.text for answer in plain}) > 1
    assert (cost.cases, cost.prefill_tokens, cost.decode_tokens) == (3, 112, 24)


@pytest.mark.parametrize("length", [3, 45, 64])
@pytest.mark.parametrize("size", [2, 7, 26])
def test_scoring_leaves_a_row_as_it_was(model, length, size):
    logits = []
    for scores in (False, True):
        decoder = Decoder(model, 2, 96, cuda_graphs=False)
        first = decoder.begin(0, torch.tensor(tokens_of(30)))
        second = decoder.begin(1, torch.tensor(tokens_of(length)))
        if scores:
            for row, before in ((0, first), (1, second)):
                assert len(decoder.score(row, before, torch.tensor(tokens_of(size, 3))).log_probs) == size
        assert decoder.cache.host_lengths == decoder.cache.lengths.tolist() == [30, length]
        logits.append([decoder.step([token, token]).clone() for token in tokens_of(18, 4)])
    for plain, scored in zip(*logits, strict=True):
        assert torch.equal(plain, scored)


def test_an_answer_that_has_no_room_is_refused(model):
    decoder = Decoder(model, 1, 50, cuda_graphs=False)
    logits = decoder.begin(0, torch.tensor(tokens_of(45)))
    with pytest.raises(ValueError, match="capacity must hold"):
        decoder.score(0, logits, torch.tensor(tokens_of(40)))


def test_every_token_of_a_text_is_scored(model):
    case = Case(prompt=tokens_of(70), answers=[], whole=True)
    (answer,), cost = answers_of(model, [case])
    assert answer.log_probs == pytest.approx(next_log_probabilities(model, case.prompt).tolist(), abs=2e-4)
    assert cost.prefill_tokens == 70


def test_samples_of_one_prompt_differ_by_their_seeds(model):
    from nsa_lightning.generation.sampling import SamplingConfig

    cases = [Case(prompt=tokens_of(9), answers=[], max_new_tokens=8, seed=seed) for seed in (0, 1, 0)]
    answerer = Answerer(model, TOKENIZER, (), OwnLayers(model.config), 3, False)
    found = dict(answerer.answers(cases, StopConfig(), SamplingConfig(temperature=1.0, top_p=1.0)))
    assert found[0].text == found[2].text != found[1].text
