"""The methods against their literal definitions, and against dense attention where the budget covers the text."""

import pytest
import torch
from nsa_kernels.errors import SettingError
from nsa_kernels.rotary import apply_rotary

from nsa_lightning.evaluation.methods import METHODS, MethodSettings, base, counts, make_method
from nsa_lightning.evaluation.methods.literal import literal
from nsa_lightning.model import TransformerConfig
from nsa_lightning.model.rope import RopeConfig, RotaryEmbedding

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
SMALL = {
    "budget": 32,
    "leading": 4,
    "local": 8,
    "block_size": 4,
    "page_size": 4,
    "memory_block_size": 5,
    "representatives": 2,
    "query_block": 6,
    "evict_every": 4,
    "dense_layers": 0,
}
CONFIG = TransformerConfig(
    hidden_size=HEADS * DIM, num_layers=2, num_heads=HEADS, num_kv_heads=KV_HEADS, value_head_dim=VALUE_DIM,
    attention=["full"], rope=RopeConfig(theta=100.0), vocab_size=16,
)  # fmt: skip
VARIANTS = {
    **{name: (name, {}) for name in METHODS},
    "exact_top_group": ("exact_top", {"per_group": True}),
    "exact_top_unforced": ("exact_top", {"leading": 0, "local": 0}),
    "quest_group": ("quest", {"per_group": True}),
    "quest_unforced": ("quest", {"leading": 0, "local": 0}),
    "infllm_window": ("infllm", {"far_positions": "window"}),
    "h2o_group": ("h2o", {"per_group": True}),
    "h2o_token_by_token": ("h2o", {"evict_every": 1}),
    "h2o_no_leading": ("h2o", {"leading": 0, "local": 16}),
}


def made(variant, **changes):
    name, settings = VARIANTS[variant]
    measure = changes.pop("measure", False)
    return make_method(name, MethodSettings(**(SMALL | settings | changes)), CONFIG, measure)


def texts(*lengths, seed=0):
    """Rotated queries and keys, and values, of some sequences; keys are few directions, so that scores differ."""
    generator, rotary = torch.Generator().manual_seed(seed), RotaryEmbedding(CONFIG.rope, DIM)
    found = []
    for length in lengths:
        q = torch.randn(length, HEADS, DIM, generator=generator, dtype=torch.float64) * 2
        k = torch.randn(length, KV_HEADS, DIM, generator=generator, dtype=torch.float64)
        v = torch.randn(length, KV_HEADS, VALUE_DIM, generator=generator, dtype=torch.float64)
        cos, sin = (x.double() for x in rotary(torch.arange(length)))
        found.append((apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v))
    return found


def attended(method, sequences, prompts, chunk=10**6, layer=1):
    """Prompts in chunks, then all sequences token by token, those that have ended idling; [L, H, D_v] of each."""
    slots = max(len(q) for q, _, _ in sequences) + 3
    out = [[] for _ in sequences]
    for row, ((q, k, v), prompt) in enumerate(zip(sequences, prompts, strict=True)):
        for start in range(0, prompt, chunk):
            stop = min(start + chunk, prompt)
            out[row].append(method.prefill(layer, row, start, q[start:stop], k[:stop], v[:stop]))
    k = torch.full((len(sequences), slots, KV_HEADS, DIM), 7.0, dtype=torch.float64)
    v = torch.full((len(sequences), slots, KV_HEADS, VALUE_DIM), 7.0, dtype=torch.float64)
    for row, (_, keys, values) in enumerate(sequences):
        k[row, : len(keys)], v[row, : len(values)] = keys, values
    for step in range(max(len(q) - prompt for (q, _, _), prompt in zip(sequences, prompts, strict=True))):
        at = [min(prompt + step, len(q) - 1) for (q, _, _), prompt in zip(sequences, prompts, strict=True)]
        queries = torch.stack([q[position] for (q, _, _), position in zip(sequences, at, strict=True)])
        found = method.decode(layer, queries, k, v, torch.tensor(at, dtype=torch.int32))
        for row, (q, _, _) in enumerate(sequences):
            if prompts[row] + step < len(q):
                out[row].append(found[row, None])
    return [torch.cat(parts) for parts in out]


def expected(variant, sequence, prompt, phases, **changes):
    name, settings = VARIANTS[variant]
    settings = MethodSettings(**(SMALL | settings | changes))
    return literal(name, *sequence, prompt, settings, CONFIG.rope, phases)


@pytest.mark.parametrize("phases", ["prefill", "decode", "both"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_follows_its_literal_definition(variant, phases):
    sequences, prompts = texts(90, 75), (63, 55)
    found = attended(made(variant, phases=phases), sequences, prompts)
    for row in range(2):
        out, read = expected(variant, sequences[row], prompts[row], phases)
        torch.testing.assert_close(found[row], out, rtol=1e-4, atol=1e-5)
        is_full = read.sum(-1) == torch.arange(1, len(read) + 1)[:, None]
        assert VARIANTS[variant][0] == "full" or not is_full.all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_dense_attention_where_the_budget_covers_the_text(variant):
    if variant == "infllm_window":
        pytest.skip("what is beyond the window is seen at another distance")
    (sequence,) = texts(32)
    for prompt in (32, 21):
        (found,) = attended(made(variant, phases="both"), [sequence], [prompt])
        (dense,) = attended(made("full"), [sequence], [32])
        torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_of_a_prompt_give_what_the_whole_gives(variant):
    (sequence,) = texts(80)
    for phases in ("both", "decode"):
        (whole,) = attended(made(variant, phases=phases), [sequence], [70])
        for chunk in (12, 24, 7) if VARIANTS[variant][0] != "infllm" else (12, 24):
            (parts,) = attended(made(variant, phases=phases), [sequence], [70], chunk)
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_scored_as_they_are_decoded_and_leave_no_trace(variant):
    sequences = texts(60, 70)
    method, other = made(variant, phases="both"), made(variant, phases="both")
    decoded = attended(other, sequences, [50, 50])
    for row, (q, k, v) in enumerate(sequences):
        method.prefill(1, row, 0, q[:50], k[:50], v[:50])
    q, k, v = sequences[1]
    for _ in range(2):  # the second time only if the first was undone
        saved = method.save(1)
        with method.answering():
            found = method.prefill(1, 1, 50, q[50:], k, v)
        method.restore(1, saved)
        torch.testing.assert_close(found, decoded[1][50:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_begins_anew(variant):
    first, second = texts(70, 66)
    method = made(variant, phases="both")
    attended(method, [first], [50])
    (again,) = attended(method, [second], [48])
    (fresh,) = attended(made(variant, phases="both"), [second], [48])
    torch.testing.assert_close(again, fresh)


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_are_those_of_the_definition(variant, monkeypatch):
    for module in (counts, base):
        monkeypatch.setattr(module, "MEASURED_EVERY", 1)
    (sequence,) = texts(80)
    method = made(variant, phases="both", measure=True)
    attended(method, [sequence], [55])
    counted = method.statistics()
    assert method.statistics() == {}
    _, read = expected(variant, sequence, 55, "both")
    settings = method.choice
    _, best = literal("exact_top_blocks", *sequence, 55, settings, CONFIG.rope, "both")
    q, k, _ = sequence
    scores = torch.einsum("thd,shd->ths", q, k.repeat_interleave(HEADS // KV_HEADS, dim=1)) * DIM**-0.5
    causal = torch.ones(80, 80, dtype=torch.bool).tril()[:, None]
    dense = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    token, query = torch.arange(80), torch.arange(80)[:, None]
    best = best & ~((token < settings.leading) | (token > query - settings.local))[:, None]
    assert counted["mass"] == pytest.approx((dense * read).sum(-1).mean().item(), rel=1e-5)
    assert counted["tokens_read"] == pytest.approx(read.sum(-1).double().mean().item(), rel=1e-6)
    assert counted["recall"] == pytest.approx(((best & read).sum() / best.sum()).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["exact_top", "quest", "infllm", "h2o", "sliding"])
def test_one_query_of_several_of_a_prompt_stands_for_them(name, monkeypatch):
    for module in (counts, base):
        monkeypatch.setattr(module, "MEASURED_EVERY", 4)
    (sequence,) = texts(80)
    method = made(name, phases="both", measure=True)
    attended(method, [sequence], [80], chunk=18)
    counted = method.statistics()
    _, read = expected(name, sequence, 80, "both", query_block=6)
    assert counted["tokens_read"] == pytest.approx(read[::4].sum(-1).double().mean().item(), rel=1e-6)
    q, k, v = sequence
    attended(method, [(q[:62], k[:62], v[:62])], [60])  # two tokens behind a prompt count as themselves
    mean = (4 * read[:60:4].sum(-1).double().mean(1).sum() + read[60:62].sum(-1).double().mean(1).sum()) / 62
    if name not in {"h2o", "infllm"}:  # their tokens behind a prompt follow from where it ends
        assert method.statistics()["tokens_read"] == pytest.approx(mean.item(), rel=1e-6)


def test_the_oracles_keep_the_most_probability():
    (sequence,) = texts(120)
    mass = {}
    for name in METHODS:
        method = made(name, phases="both", measure=True)
        attended(method, [sequence], [100])
        mass[name] = method.statistics()["mass"]
    assert mass["full"] == pytest.approx(1)
    assert max(mass, key=lambda name: mass[name] if name != "full" else 0) == "exact_top"
    assert mass["exact_top_blocks"] > max(mass["quest"], mass["infllm"], mass["sliding"])


@pytest.mark.parametrize("name", METHODS)
def test_dense_layers_and_phases_are_the_methods_own_unless_they_are_set(name):
    method = make_method(name, MethodSettings(budget=768), CONFIG)
    assert method.settings["phases"] == ("decode" if name in ("quest", "h2o") else "both")
    assert method.settings["dense_layers"] == ([0] if name == "quest" else [])  # one layer of two stays sparse
    (sequence,) = texts(60)
    chosen = made(name, phases="both", dense_layers=[1])
    found = attended(chosen, [sequence], [50])[0]
    dense = attended(made("full"), [sequence], [60])[0]
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-6)
    if name != "full":
        assert not torch.allclose(attended(chosen, [sequence], [50], layer=0)[0], dense)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("exact_top", {"budget": 600}, "budget must hold the leading and local tokens, got 600 for 128 + 512"),
        ("exact_top_blocks", {"budget": 1000}, "budget must be a multiple of block_size, got 1000 and 64"),
        ("quest", {"budget": 1001}, "budget must be a multiple of page_size, got 1001 and 16"),
        ("exact_top_blocks", {"budget": 704, "leading": 65, "local": 577}, "2 leading and 10 local blocks of 64"),
        ("h2o", {"budget": 640, "phases": "both"}, "evict_every must divide budget and be at most the 1 tokens"),
        ("infllm", {"local": 0}, "local must be at least 1 for infllm, got 0"),
        ("infllm", {"representatives": 200}, "representatives must be at most memory_block_size, got 200 and 128"),
        ("quest", {"dense_layers": [2]}, "dense_layers must be within the 2 layers of the model, got [2]"),
        ("quest", {"dense_layers": -1}, "dense_layers must not be negative, got -1"),
        ("sliding", {"phases": "always"}, "phases must be"),
        ("sliding", {"leading": -1}, "leading must be at least 0, got -1"),
        ("best", {}, "method must be one of full, exact_top"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name, settings, words):
    with pytest.raises(SettingError) as error:
        make_method(name, MethodSettings(**settings), CONFIG)
    assert words in str(error.value)


def test_a_model_without_full_layers_is_refused():
    config = TransformerConfig(num_layers=2, attention=["sliding"])
    with pytest.raises(SettingError, match="method quest needs a model with full attention layers, got sliding"):
        make_method("quest", MethodSettings(), config)


def test_cache_bytes_count_what_choosing_needs():
    length = 8192
    by_name = {
        name: make_method(name, MethodSettings(dense_layers=0), CONFIG).cache_bytes(CONFIG, length, torch.bfloat16)
        for name in METHODS
    }
    token, layers = KV_HEADS * (DIM + VALUE_DIM) * 2, 2
    assert by_name["full"] == by_name["exact_top"] == by_name["exact_top_blocks"]
    assert by_name["quest"] - by_name["full"] == layers * (length // 16) * 2 * KV_HEADS * DIM * 2
    assert by_name["full"] - by_name["sliding"] == layers * (length - 2560) * token
    assert by_name["infllm"] > by_name["full"] > by_name["h2o"] > by_name["sliding"]
