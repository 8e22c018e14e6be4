"""A model and the cache of a batch of sequences: prompts go in, logits of the next token of each sequence come out."""

from collections.abc import Callable

import torch
from torch import Tensor

from nsa_lightning.model.cache import Cache
from nsa_lightning.model.transformer import Transformer

# B sequences, L tokens of a prompt, V tokens in the vocabulary.

_WARM_UPS = 3  # runs before a capture, in which kernels are compiled and libraries allocate what they keep


class Decoder:
    """Continues up to B sequences of different lengths at once; every step has the same shapes.

    Args:
        model: its parameters' device and dtype are those of the cache.
        batch_size: sequences (B).
        capacity: tokens of the longest sequence, prompt and continuation.
        cuda_graphs: replay the step as a CUDA graph instead of launching its kernels one by one; on a GPU only.
    """

    def __init__(self, model: Transformer, batch_size: int, capacity: int, cuda_graphs: bool) -> None:
        weight = model.output_embedding
        self.model, self.batch_size = model, batch_size
        self.cache = Cache.allocate(model.config, batch_size, capacity, weight.device, weight.dtype)
        self._tokens = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        self._graphs = _StepGraphs(self._run, self._forget) if cuda_graphs and weight.is_cuda else None

    @torch.inference_mode()
    def begin(self, row: int, prompt: Tensor) -> Tensor:
        """Give a row to a prompt, int64 [L]; logits [V] of the token after it."""
        self.cache.reset(row)
        return self._logits(self.model.prefill(prompt.to(self._tokens.device), self.cache, row))

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> Tensor:
        """Append one token to every sequence; logits [B, V] of the next, overwritten by the step after it."""
        self._tokens.copy_(torch.tensor(tokens), non_blocking=True)
        completes_block = self.cache.completes_block
        if self._graphs is None:
            return self._run(completes_block)
        self.cache.count_step()
        return self._graphs.replay(completes_block)

    def end(self, row: int) -> None:
        """Forget a sequence; its row idles until `begin`, for less than `capacity` steps."""
        self.cache.reset(row)

    def _run(self, completes_block: bool) -> Tensor:
        return self._logits(self.model.decode(self._tokens, self.cache, completes_block))

    def _logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.model.output_embedding.T

    def _forget(self) -> None:
        for row in range(self.batch_size):
            self.cache.reset(row)


class _StepGraphs:
    """One step as two CUDA graphs: where no sequence completes a compression block, and where one may.

    Args:
        run: the step on tensors that keep their addresses.
        forget: empties the cache again, between steps and after them.
    """

    @torch.inference_mode()
    def __init__(self, run: Callable[[bool], Tensor], forget: Callable[[], None]) -> None:
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        pool = torch.cuda.graph_pool_handle()
        for completes_block in (False, True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    run(completes_block)
                    forget()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = run(completes_block)
            forget()
            self._graphs[completes_block] = graph, logits

    def replay(self, completes_block: bool) -> Tensor:
        """The step's logits, on the current stream."""
        graph, logits = self._graphs[completes_block]
        graph.replay()
        return logits
