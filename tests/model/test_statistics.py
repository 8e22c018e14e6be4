import torch
from nsa_kernels import NSAConfig
from support.packings import cu_seqlens

from nsa_lightning.model.statistics import NUM_GATE_BINS, branch_statistics

CONFIG = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=6)


def test_histogram_counts_every_score_in_its_bin():
    gates = torch.tensor([[[0.01, 0.51, 0.999]], [[0.0, 1.0, 0.5]]])  # [T=2, H=1, 3]
    result = branch_statistics(gates, torch.full((2, 1, 4), -1, dtype=torch.int32), cu_seqlens([2]), CONFIG)
    assert result.gate_histogram.sum(1).tolist() == [2, 2, 2]
    assert result.gate_histogram[0, 0] == 2
    assert result.gate_histogram[2, NUM_GATE_BINS - 1] == 1
    torch.testing.assert_close(result.gate_sum, torch.tensor([[0.01, 1.51, 1.499]]))
    assert result.num_tokens == 2


def test_distances_leave_out_forced_blocks_and_empty_slots():
    T = 48
    block_indices = torch.full((T, 1, 4), -1, dtype=torch.int32)
    block_indices[T - 1, 0] = torch.tensor([0, 2, 4, 5])  # 0 is the first block, 4 and 5 are local: only 2 is free
    result = branch_statistics(torch.full((T, 2, 3), 0.5), block_indices, cu_seqlens([T]), CONFIG)
    assert result.distance_histogram.sum() == 1
    assert result.distance_sum == (T - 1) - 2 * 8
    assert result.distance_histogram[4] == 1  # 16 to 31 tokens back
    assert result.beyond_window == 1


def test_a_block_that_reaches_into_the_window_is_not_beyond_it():
    T = 33
    config = NSAConfig(
        compress_block_size=4,
        compress_stride=2,
        select_block_size=8,
        num_selected_blocks=4,
        num_init_blocks=0,
        num_local_blocks=1,
        window_size=10,
    )
    block_indices = torch.full((T, 1, 4), -1, dtype=torch.int32)
    block_indices[T - 1, 0, :3] = torch.tensor([1, 2, 4])  # tokens 8-15 and 16-23; the window starts at 23
    result = branch_statistics(torch.full((T, 1, 3), 0.5), block_indices, cu_seqlens([T]), config)
    assert result.distance_histogram.sum() == 2
    assert result.beyond_window == 1
