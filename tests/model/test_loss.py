import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    monkeypatch.setattr(loss_module, "CPU_CHUNK_LOGITS", 50 * 4)
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
    monkeypatch.setattr(loss_module, "CPU_CHUNK_LOGITS", 50 * 4)
    losses = token_cross_entropy(hidden, weight, targets, IGNORED)
    assert losses.shape == targets.shape
    assert (losses[targets == IGNORED] == 0).all()
    torch.testing.assert_close(losses.sum(), summed_cross_entropy(hidden, weight, targets, IGNORED))


def test_the_divergence_is_that_of_whole_logits_with_its_gradients(monkeypatch, problem):
    """Also from a teacher of another width; no gradient reaches it."""
    monkeypatch.setattr(loss_module, "CPU_CHUNK_LOGITS", 50 * 4)
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


def narrow_problem(dtype):
    """Enough tokens for a sum in a narrow dtype to go wrong, in 128 chunks, and a teacher's."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1024, 64), (600, 64), (1024, 32), (600, 32)
    hidden, weight, *teacher = (torch.randn(shape, generator=generator) / shape[1] ** 0.25 for shape in shapes)
    targets = torch.randint(600, (1024,), generator=generator)
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight)), *(x.to(dtype) for x in teacher), targets


def distances(function, exact, inputs, truths):
    """Of a loss from its truth, in nats a token, and of its gradients from theirs, relative; of the mean's gradients.

    The scale of a mean is applied first, as it is in training.
    """
    nats = function(*inputs)
    gradients = torch.autograd.grad(nats / len(inputs[0]), inputs)
    expected = torch.autograd.grad(exact / len(inputs[0]), truths, retain_graph=True)
    assert all(gradient.dtype == x.dtype for gradient, x in zip(gradients, inputs, strict=True))
    return [
        float(abs(nats.double() - exact) / len(inputs[0])),
        *(float((a.double() - b).norm() / b.norm()) for a, b in zip(gradients, expected, strict=True)),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_sum_over_tokens_is_in_float32(monkeypatch, dtype):
    """As close to float64 as PyTorch's losses of whole logits in float32, whose gradients are rounded once."""
    monkeypatch.setattr(loss_module, "CPU_CHUNK_LOGITS", 600 * 8)
    hidden, weight, teacher_hidden, teacher_weight, targets = narrow_problem(dtype)
    truths = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    likely = (teacher_hidden.double() @ teacher_weight.double().T).softmax(-1)
    likely_here = (teacher_hidden @ teacher_weight.T).float().softmax(-1)
    everywhere = torch.ones_like(targets, dtype=torch.bool)
    cases = [
        (
            lambda h, w: summed_cross_entropy(h, w, targets, IGNORED),
            lambda h, w: F.cross_entropy((h @ w.T).float(), targets, reduction="sum"),
            F.cross_entropy(truths[0] @ truths[1].T, targets, reduction="sum"),
        ),
        (
            lambda h, w: summed_divergence(h, w, teacher_hidden, teacher_weight, everywhere),
            lambda h, w: F.kl_div((h @ w.T).float().log_softmax(-1), likely_here, reduction="sum"),
            F.kl_div((truths[0] @ truths[1].T).log_softmax(-1), likely, reduction="sum"),
        ),
    ]
    for function, plain, exact in cases:
        ours, theirs = (distances(each, exact, (hidden, weight), truths) for each in (function, plain))
        assert ours[0] < 2 * theirs[0] + 1e-6
        assert all(a < 2 * b for a, b in zip(ours[1:], theirs[1:], strict=True))
        assert exact > 1000


@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_a_float32_weight_has_a_gradient_that_was_never_rounded(monkeypatch, compiled):
    monkeypatch.setattr(loss_module, "CPU_CHUNK_LOGITS", 600 * 256)
    hidden, weight, _, _, targets = (x.float().detach().requires_grad_() if x.is_floating_point() else x
                                     for x in narrow_problem(torch.bfloat16))  # fmt: skip

    def mean(hidden, weight):
        return summed_cross_entropy(hidden, weight, targets, IGNORED) / 1024

    with torch.autocast("cpu", torch.bfloat16):
        nats = (torch.compile(mean, backend="aot_eager", fullgraph=True) if compiled else mean)(hidden, weight)
    gradients = torch.autograd.grad(nats, (hidden, weight))
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets)
    assert nats.dtype == gradients[1].dtype == torch.float32
    assert abs(nats.double() - exact) < 1e-4
    expected = torch.autograd.grad(exact, (hidden, weight))
    for gradient, truth in zip(gradients, expected, strict=True):
        assert (gradient - truth).norm() < 3e-3 * truth.norm()
    assert (gradients[1] != gradients[1].bfloat16().float()).any()


class LargestOutput(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(x.numel() for x in tree_leaves(output) if isinstance(x, torch.Tensor)), 0)
        return output


@pytest.mark.parametrize("grad", [True, False])
def test_it_never_holds_the_logits_of_all_tokens(monkeypatch, grad):
    monkeypatch.setattr(loss_module, "CPU_CHUNK_LOGITS", 16 * 100)
    hidden, weight = torch.randn(400, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    with LargestOutput() as largest, torch.set_grad_enabled(grad):
        loss = chunked_cross_entropy(hidden, weight, torch.zeros(400, dtype=torch.long), IGNORED)
        if grad:
            loss.backward()
    assert largest.numel == 400 * 4  # the hidden states; a chunk has as many logits


def test_a_graph_refuses_a_second_walk_backward(problem):
    """Its gradients are scaled in place: the second would be wrong."""
    hidden, weight, targets = problem
    loss = chunked_cross_entropy(hidden, weight, targets, IGNORED)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("function", [summed_cross_entropy, chunked_cross_entropy])
def test_the_gradient_is_scaled_by_what_follows(problem, function):
    hidden, weight, targets = problem
    once = torch.autograd.grad(function(hidden, weight, targets, IGNORED), (hidden, weight))
    thrice = torch.autograd.grad(3 * function(hidden, weight, targets, IGNORED), (hidden, weight))
    for gradient, tripled in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * gradient, tripled)


@pytest.mark.gpu
def test_on_a_gpu_the_loss_is_as_close_as_bfloat16_allows():
    hidden = torch.randn(3000, 256, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(50000, 256, device="cuda") / 16).bfloat16().requires_grad_()
    targets = torch.randint(50000, (3000,), device="cuda").masked_fill(torch.rand(3000, device="cuda") < 0.1, IGNORED)
    loss = chunked_cross_entropy(hidden, weight, targets, IGNORED)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = F.cross_entropy(exact[0] @ exact[1].T, targets, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=0)
    for gradient, expected in zip(gradients, torch.autograd.grad(truth, exact), strict=True):
        assert (gradient - expected).norm() < 0.01 * expected.norm()


def test_a_bfloat16_input_works_with_a_float32_weight(problem):
    hidden, weight, targets = problem
    expected = summed_cross_entropy(hidden, weight, targets, IGNORED)
    actual = summed_cross_entropy(hidden.bfloat16(), weight, targets, IGNORED)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0)
