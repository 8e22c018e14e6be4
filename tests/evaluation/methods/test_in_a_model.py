"""Methods in the place of a model's own attention, and what they hold in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_lightning.evaluation.methods import METHODS, MethodSettings, make_method, scores
from nsa_lightning.generation.decoder import Decoder
from nsa_lightning.model import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=32,
    attention=["full", "sliding"], sliding_window=24,
)  # fmt: skip
SETTINGS = MethodSettings(
    budget=64, leading=8, local=16, block_size=8, page_size=8, memory_block_size=8, query_block=8, evict_every=8,
    phases="both", dense_layers=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = Transformer(CONFIG)
    made.init_weights(seed=0)
    made = made.double().requires_grad_(False).eval()
    for block in made.blocks:
        block.self_attn.q_proj.weight.mul_(6)  # attention that is sharp enough to tell what is read
    return made


def logits(model, method, lengths, steps):
    """Of prompts of several lengths, and of some more tokens of each."""
    options = {} if method is None else {"dense_attention": method}
    decoder = Decoder(model, len(lengths) + 1, max(lengths) + steps, False, **options)  # the last row idles
    tokens = torch.randint(64, (len(lengths) + 1, max(lengths) + steps), generator=torch.Generator().manual_seed(1))
    found = [decoder.begin(row, tokens[row, :length]) for row, length in enumerate(lengths)]
    for step in range(steps):
        given = [tokens[row, length + step].item() for row, length in enumerate((*lengths, 0))]
        found.extend(decoder.step(given)[: len(lengths)].clone())
    return torch.stack(found)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_attends_as_ever_within_the_budget_and_otherwise_beyond_it(model, name):
    method = make_method(name, SETTINGS, CONFIG)
    torch.testing.assert_close(logits(model, method, (50, 31), 14), logits(model, None, (50, 31), 14))
    method.begin()
    beyond = logits(model, method, (120, 90), 3)
    assert torch.allclose(beyond, logits(model, None, (120, 90), 3), rtol=0, atol=1e-9) == (name == "full")


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        found = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *found])
        return out


class Dense:
    """Dense attention to a prompt is not the methods' own work."""

    def prefill(self, layer, row, start, q, k, v):
        return q


@pytest.mark.parametrize("phases", ["both", "decode"])
@pytest.mark.parametrize("name", METHODS)
def test_memory_grows_with_the_text_and_not_with_its_square(name, phases, monkeypatch):
    monkeypatch.setattr(scores, "_NUMBERS_ON_CPU", 2**15)
    method = make_method(name, SETTINGS, CONFIG, measure=True)
    method.sparse_prompt = phases == "both"
    largest = []
    for length in (512, 1024):
        q, k = torch.randn(length, 4, 8), torch.randn(length, 2, 8)
        method._exact = Dense()
        with Largest() as made:
            method.prefill(0, 0, 0, q, k, k)
        largest.append(made.numbers)
    assert largest[1] <= 2 * max(largest[0], 2**15)
    assert largest[1] < 1024 * 1024
