"""The one place that chooses: which implementation runs each stage, and why not a faster one.

A plan depends on the device, the dtypes, the sizes of heads and blocks, and the backend that is asked for. It is made
once for each set of them; everything else follows it.
"""

import functools
import warnings
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from nsa_kernels.errors import SettingError
from nsa_kernels.geometry import NSAConfig

Backend = Literal["auto", "triton", "eager", "reference"]

HAS_TRITON = find_spec("triton") is not None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
"""Largest head dimension that fits a tile."""

_LEAST_CAPABILITY = (8, 0)
_SMALLEST_BLOCK = 16
"""Keys that a matrix instruction takes at least."""

_ON_HOPPER = (
    "compressed_attention", "selected_attention", "sliding_attention", "query_gradient", "compressed_gradient",
    "selected_gradient", "sliding_gradient",
)  # fmt: skip
"""Stages that have a kernel for Hopper."""
_HOPPER_HEAD_DIMS, _HOPPER_ROWS, _HOPPER_GROUPS = (64, 128), 64, (2, 4, 8, 16, 32, 64)
"""Head dims, rows of a tile, and the groups that fill one, of the kernels for Hopper."""
_LEAST_SLIDING_DIM = 128
"""Head dim from which the sliding branch's forward kernel for Hopper is faster than the one in Triton."""
_SHARED_HEAD_DIM, _LEAST_SHARED = 128, 4
"""Head dim and smallest group of the selected branch's forward for Hopper: below this head dim the kernel in Triton is
faster, and in smaller groups the queries of two times 64 rows have no bit each in a mask."""
_LEAST_GATHERED = 8
"""Rows that the copy engine gathers at once: what the swizzle of shared memory repeats after."""

# H query heads, H_kv KV heads, D_qk and D_v head dims.


class Stages(NamedTuple):
    """One text for each stage: the name of its implementation, or a reason."""

    compress: str
    compressed_attention: str
    block_selection: str
    selected_attention: str
    sliding_attention: str  # with the gated sum of the branches where there are kernels
    query_gradient: str  # of all branches, and of the gates
    compressed_gradient: str  # of the keys and values of this branch
    selected_gradient: str
    sliding_gradient: str
    decoding: str  # one new token, and what is appended for it

    @property
    def spelled(self) -> str:
        """All of them in one text, as PyTorch's operators take it."""
        return " ".join(self)

    @classmethod
    def read(cls, spelled: str) -> "Stages":
        """The names that `spelled` put together."""
        return cls(*spelled.split())


class Plan(NamedTuple):
    """What runs for inputs of one kind."""

    backend: str
    """`triton`, `eager` or `reference`."""
    stages: Stages
    """The implementation of each stage: `hopper` beside those."""
    reasons: Stages
    """Why a faster implementation of each stage was not taken; empty if there is none."""

    def describe(self) -> str:
        """One line a stage: its implementation, and why it is not a faster one."""
        width = max(map(len, Stages._fields))
        rows = zip(Stages._fields, self.stages, self.reasons, strict=True)
        return "\n".join(f"{name:<{width}}  {choice:<9}  {reason}".rstrip() for name, choice, reason in rows)


class _Inputs(NamedTuple):
    """What a choice depends on."""

    backend: Backend
    wanted: bool  # whether kernels are
    device_type: str
    interpreted: bool  # whether Triton runs kernels in Python, on CPU tensors
    capability: tuple[int, int] | None  # of the GPU; None where there is none to ask
    dtypes: tuple[torch.dtype, torch.dtype]  # of q and v
    heads: tuple[int, int]  # H, H_kv
    head_dims: tuple[int, int]  # D_qk, D_v
    block_size: int | None  # of the selected branch; None where no stage reads it


def plan(q: Tensor, v: Tensor, config: NSAConfig | None, backend: Backend = "auto") -> Plan:
    """Choose the implementation of each stage.

    Args:
        q: queries, [..., H, D_qk].
        v: values, [..., H_kv, D_v].
        config: block sizes; None if nothing but tokens is attended to.
        backend: `triton` demands kernels, which need a GPU, `eager` and `reference` are plain PyTorch; `auto` takes the
            fastest that takes the inputs, and warns where that is none of the kernels although there is a GPU.

    Raises:
        ValueError: the backend is unknown, or does not take the inputs.
    """
    if backend not in get_args(Backend):
        raise SettingError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    wanted = backend in ("auto", "triton") and (q.is_cuda or backend == "triton")
    interpreted = wanted and HAS_TRITON and _interpreted()
    inputs = _Inputs(
        backend,
        wanted,
        q.device.type,
        interpreted,
        _capability(q.device) if wanted and q.is_cuda and not interpreted else None,
        (q.dtype, v.dtype),
        (q.shape[-2], v.shape[-2]),
        (q.shape[-1], v.shape[-1]),
        None if config is None else config.select_block_size,
    )
    chosen, reason = _choose(inputs) if torch.compiler.is_compiling() else _chosen(inputs)
    if reason and backend == "triton":
        raise SettingError(f"backend triton does not take these inputs: {reason}")
    if reason:
        warnings.warn(f"attention runs on the slow eager backend, the kernels do not apply: {reason}", stacklevel=3)
    return chosen


def elementwise_implementation(x: Tensor) -> Literal["triton", "eager"]:
    """What computes number by number: kernels where no gradient is wanted and no compiler fuses what follows."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not (x.is_cuda and HAS_TRITON):
        return "eager"
    return "triton" if x.dtype in DTYPES and _capability(x.device) >= _LEAST_CAPABILITY else "eager"


def readable(x: Tensor) -> bool:
    """Whether the host can look at the numbers of x at no cost: it holds some, and no device is waited for."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and not is_fake(x)


def check_kernel_inputs(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    """The factor of the scores, once keys and values are known to be such as the kernels take beside q.

    Raises:
        ValueError: a dtype, a head dimension or a scale that they do not take.
    """
    reason = _reason_against_tensors((q.dtype, k.dtype, v.dtype), (k.shape[-1], v.shape[-1]))
    if reason:
        raise SettingError(reason)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise SettingError(f"scale must be positive, got {scale}")
    return scale


def _choose(inputs: _Inputs) -> tuple[Plan, str]:
    """The plan, and why the kernels that were wanted do not apply."""
    reason = _reason_against_triton(inputs) if inputs.wanted else ""
    if inputs.wanted and not reason:
        against = _reasons_against_hopper(inputs)
        rows = zip(Stages._fields, against, strict=True)
        names = ("hopper" if stage in _ON_HOPPER and not slower else "triton" for stage, slower in rows)
        return Plan("triton", Stages(*names), against), ""
    name = "reference" if inputs.backend == "reference" else "eager"
    why = f"there is no GPU, q is on {inputs.device_type}"
    if reason or inputs.backend == name:
        why = reason or f"backend {name} was asked for"
    return Plan(name, _everywhere(name)._replace(decoding="eager"), _everywhere(why)), reason


_chosen = functools.cache(_choose)


def _reason_against_triton(inputs: _Inputs) -> str:
    """Why the kernels do not take the inputs; empty if they do."""
    if not HAS_TRITON:
        return "triton is not installed"
    size, smallest = inputs.block_size, 1 if inputs.interpreted else _SMALLEST_BLOCK
    if size is not None and (size < smallest or size & (size - 1)):
        return f"select_block_size must be a power of two from {smallest} on, got {size}"
    if inputs.interpreted and inputs.dtypes[0] == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if not inputs.interpreted:
        if inputs.capability is None:
            return f"they are on {inputs.device_type}, the kernels run on CUDA devices"
        if inputs.capability < _LEAST_CAPABILITY:
            return "the kernels need an Ampere GPU (compute capability 8.0) or a newer one"
    return _reason_against_tensors((inputs.dtypes[0], *inputs.dtypes), inputs.head_dims)


def _reason_against_tensors(dtypes: tuple[torch.dtype, ...], head_dims: tuple[int, int]) -> str:
    """Why the kernels do not take q, k and v of these dtypes, and k and v of these head dims; empty if they do."""
    dtype = dtypes[0]
    if any(other != dtype for other in dtypes) or dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        return f"q, k and v must share one dtype of {names}, got {dtypes[0]}, {dtypes[1]} and {dtypes[2]}"
    step = 16 // dtype.itemsize
    for name, head_dim in zip(("k", "v"), head_dims, strict=True):
        if head_dim % step or head_dim > MAX_HEAD_DIM:
            return (
                f"the head dimension of {name} must be a multiple of {step} up to {MAX_HEAD_DIM} "
                f"for the triton backend, got {head_dim}"
            )
    return ""


def _reasons_against_hopper(inputs: _Inputs) -> Stages:
    """Why each stage that has a kernel for Hopper does not run on it; empty for the others too."""
    (qk_dim, v_dim), group_size, size = inputs.head_dims, inputs.heads[0] // inputs.heads[1], inputs.block_size
    runs = _reason_against_hopper(inputs)
    tiles = runs
    if not tiles and group_size not in _HOPPER_GROUPS:
        tiles = "hopper: a tile of 64 rows holds groups of 2, 4, 8, 16, 32 or 64 heads"
    if not tiles and (size is None or size % _HOPPER_ROWS):
        tiles = "hopper: a step takes 64 keys, select_block_size must be a multiple"
    selected, gathered, sliding = tiles, tiles, runs
    if not selected and not (qk_dim == v_dim == _SHARED_HEAD_DIM):
        selected = "hopper: slower than Triton for other head dims than 128"
    if not selected and group_size < _LEAST_SHARED:
        selected = "hopper: a mask has no bit for each query of a tile in groups of less than 4 heads"
    if not gathered and group_size < _LEAST_GATHERED:
        gathered = "hopper: 8 rows are copied at once, a group of less than 8 heads has not as many"
    if not sliding and max(qk_dim, v_dim) < _LEAST_SLIDING_DIM:
        sliding = "hopper: slower than Triton for head dims below 128"
    return Stages("", runs, "", selected, sliding, tiles, runs, gathered, runs, "")


def _reason_against_hopper(inputs: _Inputs) -> str:
    """Why no kernel for Hopper takes the inputs; empty if those of some stages do."""
    if inputs.capability is None or inputs.capability[0] != 9:
        return "hopper: the kernels are for compute capability 9 alone"
    if inputs.dtypes[0].itemsize > 2:
        return "hopper: the kernels take bfloat16 and float16"
    if inputs.head_dims[0] not in _HOPPER_HEAD_DIMS or inputs.head_dims[1] not in _HOPPER_HEAD_DIMS:
        return "hopper: the kernels take head dims of 64 and 128"
    return ""


def _everywhere(text: str) -> Stages:
    return Stages(*[text] * len(Stages._fields))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python."""
    from nsa_kernels.triton.primitives import interpreted

    return bool(interpreted())
