import pytest
import torch
from nsa_kernels import NSAConfig
from nsa_kernels.eager import block_selection, compress, compressed_attention
from support.packings import SMALL, cu_seqlens

from nsa_lightning.benchmark.cases import Shape, document_lengths
from nsa_lightning.benchmark.inputs import MEASURED_UNIONS, autoregressive, make_inputs, neighbour_union

CPU = torch.device("cpu")


def chosen_blocks(inputs, config):
    """The operator's choice, without reading values."""
    with torch.no_grad():
        keys = compress(inputs.k, inputs.cu_seqlens, config)
        _, lse = compressed_attention(inputs.q, keys, keys[..., :8], inputs.cu_seqlens, config)
        return block_selection(inputs.q, keys, lse, inputs.cu_seqlens, config)


@pytest.mark.parametrize("group_size", [1, 4])
def test_overlap_inputs_choose_blocks_as_neighbours_of_a_real_model_do(group_size):
    config = NSAConfig()
    shape = Shape("test", 2 * group_size, 2, 128, 8)
    inputs = make_inputs("overlap", shape, [7168], config, torch.bfloat16, CPU)
    blocks = chosen_blocks(inputs, config)
    for neighbours, measured in MEASURED_UNIONS.items():
        assert neighbour_union(blocks, neighbours, inputs.cu_seqlens, config, 4096) == pytest.approx(measured, rel=0.05)


def test_random_inputs_share_little_more_than_the_forced_blocks():
    config = NSAConfig()
    inputs = make_inputs("random", Shape("test", 2, 2, 64, 8), [6144], config, torch.bfloat16, CPU)
    assert neighbour_union(chosen_blocks(inputs, config), 4, inputs.cu_seqlens, config, 4096) > 35


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 4096 + 130])
def test_the_blockwise_scan_is_the_recursion(num_tokens):
    noise = torch.randn(num_tokens, 3, dtype=torch.float32)
    expected = [noise[0].double()]
    for row in noise[1:].double():
        expected.append(0.9 * expected[-1] + (1 - 0.9**2) ** 0.5 * row)
    torch.testing.assert_close(autoregressive(noise, 0.9), torch.stack(expected).float(), rtol=1e-5, atol=1e-5)


def test_neighbour_union_counts_distinct_blocks_of_runs_inside_one_document():
    n = SMALL.selected_tokens  # 32: from here on a query sees more blocks than it selects
    offsets = cu_seqlens([n + 4, n + 5])
    blocks = torch.full((2 * n + 9, 1, 4), -1, dtype=torch.int32)
    blocks[n : n + 4, 0] = torch.tensor([[0, 1, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 3, 4]], dtype=torch.int32)
    blocks[2 * n + 4 :, 0] = torch.tensor([0, 1, 3, 4], dtype=torch.int32)
    assert neighbour_union(blocks, 2, offsets, SMALL) == pytest.approx((5 + 4 + 4 + 4) / 4)
    assert neighbour_union(blocks, 4, offsets, SMALL) == pytest.approx((5 + 4) / 2)
    assert neighbour_union(blocks, 8, offsets, SMALL) is None


@pytest.mark.parametrize("mix", ["one", "mixed", "equal_1k"])
@pytest.mark.parametrize("num_tokens", [1, 1500, 65536])
def test_documents_fill_the_packing_exactly(mix, num_tokens):
    lengths = document_lengths(mix, num_tokens)
    assert sum(lengths) == num_tokens
    assert min(lengths) >= min(num_tokens, 128)
    assert len(lengths) > 1 or mix == "one" or num_tokens < 2000


@pytest.mark.parametrize("kind", ["random", "overlap"])
def test_inputs_are_the_same_in_every_run(kind):
    first, second = (make_inputs(kind, Shape("test", 4, 2, 16, 8), [90, 70], SMALL, torch.float16, CPU) for _ in "ab")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert first.q.dtype == torch.float16
    assert first.q.detach().float().var() == pytest.approx(1, rel=0.3)
