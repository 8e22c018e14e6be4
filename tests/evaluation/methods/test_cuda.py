"""Methods on a GPU: the same results as on a CPU, and a prompt of 64K tokens within a few gigabytes."""

import pytest
import torch

from nsa_lightning.evaluation.methods import METHODS, MethodSettings, make_method
from nsa_lightning.model import TransformerConfig

pytestmark = pytest.mark.gpu

CONFIG = TransformerConfig(hidden_size=576, num_layers=1, num_heads=9, num_kv_heads=3, attention=["full"])
SMALL = MethodSettings(budget=256, leading=32, local=64, memory_block_size=32, query_block=32, dense_layers=0, phases="both")  # fmt: skip  # noqa: E501


def text(length, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, heads, 64, generator=generator, dtype=torch.float64) for heads in (9, 3, 3))
    return [x.to(device, dtype) for x in (2 * q, k, v)]


@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_gives_what_a_cpu_gives(name):
    out = {}
    for device in ("cpu", "cuda"):
        method = make_method(name, SMALL, CONFIG, measure=True)
        q, k, v = text(600, torch.float64, device)
        prompt = method.prefill(0, 0, 0, q[:590], k[:590], v[:590])
        steps = [
            method.decode(0, q[t, None], k[None], v[None], torch.tensor([t], dtype=torch.int32, device=device))
            for t in range(590, 600)
        ]
        out[device] = torch.cat([prompt, *steps]).cpu(), method.statistics()
    torch.testing.assert_close(out["cuda"][0], out["cpu"][0], rtol=1e-5, atol=1e-6)
    assert out["cuda"][1] == pytest.approx(out["cpu"][1], rel=1e-6)


@pytest.mark.parametrize("phases", ["both", "decode"])
@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_of_64k_tokens_takes_a_few_gigabytes(name, phases):
    method = make_method(name, MethodSettings(dense_layers=0, phases=phases), CONFIG)
    q, k, v = text(65536, torch.bfloat16, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for start in range(0, len(q), 16384):
        stop = start + 16384
        out = method.prefill(0, 0, start, q[start:stop], k[:stop], v[:stop])
    assert out.isfinite().all()
    assert torch.cuda.max_memory_allocated() - before < 6 * 2**30
