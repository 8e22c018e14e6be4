"""Infinity and NaN of one document leave every other one as it is, and the tokens before them, forward and backward."""

import pytest
import torch
from nsa_kernels import NSAConfig, native_sparse_attention
from support.packings import Inputs, random_inputs

CONFIG = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=4, num_selected_blocks=3, window_size=5)
LENGTHS = [9, 18, 1, 6]
BAD = 9 + 7  # a token in the middle of the second document
BEFORE, AFTER = slice(0, BAD), slice(9 + 18, sum(LENGTHS))
NAMES = ["q", "k", "v", "gates", "sliding_k", "sliding_v", "compress_k", "compress_v"]


def small(kind="linear", **options) -> Inputs:
    sizes = {"num_heads": 2, "num_kv_heads": 1, "qk_dim": 8, "v_dim": 4, "dtype": torch.float32}
    return random_inputs(LENGTHS, CONFIG, kind=kind, **(sizes | options))


def spoilt(inputs: Inputs, name: str, value: float, token: int = BAD) -> Inputs:
    x = getattr(inputs, name).detach().clone()
    x[token] = value
    return inputs._replace(**{name: x.requires_grad_()})


def skip_where_impossible(backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")


def attended(inputs: Inputs, backend: str, scored: slice | None = None):
    """Output, and gradients by name of a loss on some tokens, or on all of them where it is not finite either."""
    out = native_sparse_attention(**inputs._asdict(), config=CONFIG, backend=backend).out
    leaves = inputs.leaves()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    if scored is None:
        grad = grad.where(out.isfinite(), float("nan"))
    else:
        unscored = torch.ones(len(out), dtype=torch.bool)
        unscored[scored] = False
        grad[unscored] = 0
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out), materialize_grads=True)
    return out.detach(), dict(zip(leaves, gradients, strict=True))


def assert_same(actual, expected, what):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=lambda m: f"{what}: {m}")


CASES = [
    *((backend, name, value) for backend in ("reference", "eager") for name in NAMES for value in ("inf", "nan")),
    *(("triton", name, value) for name, value in (("q", "nan"), ("k", "nan"), ("v", "inf"))),
]
"""Fewer with Triton's interpreter, which is slow."""


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "name", "value"), CASES)
def test_other_documents_and_earlier_tokens_are_as_without(backend, name, value):
    skip_where_impossible(backend)
    inputs = small("mean" if backend == "triton" else "linear")
    clean, (out, gradients) = attended(inputs, backend), attended(spoilt(inputs, name, float(value)), backend)
    assert_same(out[BEFORE], clean[0][BEFORE], "earlier tokens")
    assert_same(out[AFTER], clean[0][AFTER], "later documents")
    assert not out[BAD : 9 + 18].isfinite().all()
    for part in NAMES:
        for where, rows in (("documents before", slice(0, 9)), ("documents after", AFTER)):
            assert_same(gradients[part][rows], clean[1][part][rows], f"d {part}, {where}")
    assert not all(gradients[part][9 : 9 + 18].isfinite().all() for part in NAMES)


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("name", ["k", "v", "compress_k", "compress_v", "sliding_v"])
def test_a_loss_of_other_documents_gives_the_gradients_that_it_gives_without(name, kind):
    """Also to the weights of the summaries, which all documents share."""
    backend, inputs = "eager", small(kind)
    for scored in (slice(0, 9), AFTER):
        _, expected = attended(inputs, backend, scored)
        _, actual = attended(spoilt(inputs, name, float("inf")), backend, scored)
        for part, gradient in expected.items():
            if "." in part:
                assert_same(actual[part], gradient, f"d {part}")
            elif part != "gates":  # those of the document itself are of no interest
                assert_same(actual[part][scored], gradient[scored], f"d {part}")
        assert expected["q"][scored].any()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gates"])
def test_a_loss_of_earlier_tokens_gives_the_gradients_that_it_gives_without(name):
    inputs = small("mlp")
    (_, expected), (_, actual) = (attended(x, "eager", BEFORE) for x in (inputs, spoilt(inputs, name, float("nan"))))
    for part, gradient in expected.items():
        rows = slice(None) if "." in part else BEFORE
        assert_same(actual[part][rows], gradient[rows], f"d {part}")


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[5, 27, 3], [40], [1, 1, 1, 31]])
@pytest.mark.parametrize("token", [0, 4, 6, 33])
def test_eager_spoils_what_the_reference_spoils_and_nothing_else(lengths, token):
    """Whole rows of a head at least: where one number of a value is infinite, the reference has the others."""
    if token >= sum(lengths):
        pytest.skip("no such token")
    inputs = random_inputs(lengths, CONFIG, kind="mean", rotary=False)
    for name in NAMES:
        bad = spoilt(inputs, name, float("nan"), token)
        outs = [
            native_sparse_attention(**bad._asdict(), config=CONFIG, backend=backend).out.isfinite().all(-1)
            for backend in ("reference", "eager")
        ]
        assert torch.equal(*outs), name
        assert name.startswith("compress") or not outs[0].all()  # the last tokens are in no complete block
