"""A model that has learned to copy finds its needle; one that has not does not."""

import json
import random
from dataclasses import replace

import pytest
import torch
from nsa_kernels.packing import document_positions
from support.packings import cu_seqlens

from nsa_lightning.data.tokenizer import Tokenizer
from nsa_lightning.evaluation import words
from nsa_lightning.evaluation.answering import Answerer
from nsa_lightning.evaluation.method import OwnLayers
from nsa_lightning.evaluation.needle import NeedleConfig, NeedleTask
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.model.attention.nsa import NSALayerConfig
from nsa_lightning.model.loss import summed_cross_entropy
from nsa_lightning.model.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.slow
LENGTH, BATCH, STEPS = 180, 16, 120
FEW = ("calm", "bold", "wise"), ("owl", "elm", "fox")
NSA = NSALayerConfig(
    compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, num_local_blocks=1,
    window_size=8,
)  # fmt: skip


@pytest.fixture
def form(monkeypatch):
    """Texts of few words, each of them one token: a value and the full stop behind it are one, too."""
    monkeypatch.setattr(words, "ADJECTIVES", FEW[0])
    monkeypatch.setattr(words, "NOUNS", FEW[1])
    drawn = random.Random(0)
    text = " ".join(words.sentence(drawn) for _ in range(3000))
    task = "Some special magic are hidden within the following text. Make sure to memorize them. I will quiz you about "
    task += "afterwards. What is mentioned in provided text? word words The One of for"
    compounds = [f"{first}-{second}" for first in FEW[0] for second in FEW[1]]
    pieces = [*text.split(), *task.split(), *compounds, *(f"{name}{end}" for name in compounds for end in ".:")]
    names = ["<|endoftext|>", "[UNK]", *sorted({*pieces, "is", "is:"})]
    state = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {name: i for i, name in enumerate(names)}, "unk_token": "[UNK]"},
    }  # fmt: skip
    return PromptForm(Tokenizer(json.dumps(state)))


def cases_of(form, seed, samples):
    config = NeedleConfig(depths=[0.1, 0.5, 0.8], values="word", samples=samples, seed=seed)
    task = NeedleTask("single", config, [LENGTH], form)
    cases = [planned.build() for planned in task.cases()]
    return task, [replace(case, max_new_tokens=2) for case in cases]  # a long answer of few words finds all by chance


def train(model, cases):
    """Steps on the value alone, which one pass over the prompt predicts."""
    optimizer, drawn = torch.optim.AdamW(model.parameters(), lr=5e-3), random.Random(1)
    for _ in range(STEPS):
        batch = drawn.sample(cases, BATCH)
        lengths = [len(case.prompt) for case in batch]
        offsets = cu_seqlens(lengths)
        tokens = torch.tensor([token for case in batch for token in case.prompt])
        targets = torch.full_like(tokens, -100)
        targets[offsets[1:].long() - 1] = torch.tensor([case.expected[0] for case in batch])
        hidden = model(tokens, document_positions(offsets, len(tokens)), offsets, max(lengths)).hidden
        loss = summed_cross_entropy(hidden, model.output_embedding, targets, -100) / BATCH
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def means(model, form, task, cases):
    answerer = Answerer(model, form.tokenizer, (), OwnLayers(model.config), 4, False)
    counts = [task.score(cases[number], answer) for number, answer in answerer.answers(cases, task.stop)]
    return {name: sum(count[name] for count in counts) / len(counts) for name in counts[0]}


def test_a_model_trained_to_copy_finds_its_needle_and_an_untrained_one_does_not(form):
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=form.tokenizer.vocab_size, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2,
        intermediate_size=128, nsa=NSA, tie_embeddings=False,
    )  # fmt: skip
    model = Transformer(config)
    task, unseen = cases_of(form, seed=99, samples=6)
    assert all(len(case.expected) == 1 for case in unseen)
    untrained = means(model, form, task, unseen)
    _, seen = cases_of(form, seed=0, samples=60)
    train(model, seen)
    trained = means(model, form, task, unseen)
    assert untrained["score"] < 0.3
    assert untrained["log_probability"] < -3
    assert trained["score"] > 0.8
    assert trained["log_probability"] > -0.5
