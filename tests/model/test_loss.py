import pytest
import torch
import torch.nn.functional as F

from nsa_lightning.model import loss as loss_module
from nsa_lightning.model.loss import (
    chunked_cross_entropy,
    summed_cross_entropy,
    summed_divergence,
    token_cross_entropy,
)

IGNORED = -100


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (37,), generator=generator)
    targets[::5] = IGNORED
    return hidden, weight, targets


@pytest.mark.parametrize("function", [summed_cross_entropy, chunked_cross_entropy])
def test_equals_the_loss_of_whole_logits_with_its_gradients(monkeypatch, problem, function):
    hidden, weight, targets = problem
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 50 * 4)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    actual = function(hidden, weight, targets, IGNORED)
    gradients = torch.autograd.grad(actual, (hidden, weight))
    torch.testing.assert_close(actual, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert actual > 0


@pytest.mark.parametrize("function", [summed_cross_entropy, chunked_cross_entropy])
def test_all_targets_ignored_gives_zero_and_no_gradient(problem, function):
    hidden, weight, targets = problem
    actual = function(hidden, weight, torch.full_like(targets, IGNORED), IGNORED)
    gradients = torch.autograd.grad(actual, (hidden, weight))
    assert actual == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_token_losses_add_up_to_the_sum(monkeypatch, problem):
    hidden, weight, targets = problem
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 50 * 4)
    losses = token_cross_entropy(hidden, weight, targets, IGNORED)
    assert losses.shape == targets.shape
    assert (losses[targets == IGNORED] == 0).all()
    torch.testing.assert_close(losses.sum(), summed_cross_entropy(hidden, weight, targets, IGNORED))


def test_the_divergence_is_that_of_whole_logits_with_its_gradients(monkeypatch, problem):
    """Also from a teacher of another width; no gradient reaches it."""
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 50 * 4)
    hidden, weight, targets = problem
    teacher_hidden, teacher_weight = torch.randn(37, 6), torch.randn(50, 6)
    compared = targets != IGNORED
    truth = F.kl_div(
        (hidden @ weight.T)[compared].log_softmax(-1),
        (teacher_hidden @ teacher_weight.T)[compared].softmax(-1),
        reduction="sum",
    )
    actual = summed_divergence(hidden, weight, teacher_hidden, teacher_weight, compared)
    torch.testing.assert_close(actual, truth, rtol=1e-5, atol=0)
    pairs = zip(
        torch.autograd.grad(actual, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight)), strict=True
    )
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert actual > 1
    assert summed_divergence(hidden, weight, hidden, weight, compared).abs() < 1e-4


def test_the_fallback_never_holds_the_logits_of_all_tokens(monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 16 * 100)
    hidden, weight = torch.randn(400, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    saved = 0

    def pack(tensor):
        nonlocal saved
        saved += 0 if tensor.untyped_storage().data_ptr() in (hidden.data_ptr(), weight.data_ptr()) else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_cross_entropy(hidden, weight, torch.zeros(400, dtype=torch.long), IGNORED)
    assert saved < 400 * 100 / 4


def test_a_bfloat16_input_works_with_a_float32_weight(problem):
    hidden, weight, targets = problem
    expected = summed_cross_entropy(hidden, weight, targets, IGNORED)
    actual = summed_cross_entropy(hidden.bfloat16(), weight, targets, IGNORED)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0)
