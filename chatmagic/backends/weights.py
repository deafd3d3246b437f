"""Whether a model is still as it was when something was kept of what it computed."""

import math
from collections.abc import Iterable, Sequence

import torch

WHOLE = 2**16
"""The elements of a weight that are all looked at before a turn; of a larger one some are, see `stride`."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: torch.nn.Module) -> list:
    """Differs once a weight was trained, loaded, moved or replaced, an adapter added, merged or switched, or a hook
    added.

    torch counts a tensor's in-place updates in `_version`, PEFT's layers tell how their adapters stand; but what is
    written past torch, by bitsandbytes' optimizers, through `.data` or a NumPy view, only the bits tell.
    """
    state = [(id(weight), weight.data_ptr(), weight._version) for weight in model.parameters()]
    for module in model.modules():
        state += [*module._forward_pre_hooks, *module._forward_hooks]
        if "merged_adapters" in vars(module):
            state.append((module.disable_adapters, *module.active_adapters, *module.merged_adapters))
    return [state, sample(model.parameters())]


def sample(tensors: Iterable[torch.Tensor]) -> list[bytes]:
    """Bits of the tensors, gathered once a device and dtype: every row and every column has some in it, a tensor of no
    more than WHOLE elements all of its own. What holds no data here, being offloaded, is left out."""
    places: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        data = tensor.data
        if data.is_meta or not data.numel() or type(data) is not torch.Tensor:
            continue
        bits = data.view(INTEGERS[data.element_size()]).flatten()
        places.setdefault((bits.device, bits.dtype), []).append(bits[:: stride(data.shape)])
    return [torch.cat(bits).cpu().numpy().tobytes() for bits in places.values()]


def stride(shape: Sequence[int]) -> int:
    """How far from one another the elements are that are looked at: less than a row, so that none is passed by, and
    less than a column, with no factor in common with a row, so that all columns have their turn. NF4's bytes, whose
    rows are not to be seen, are taken for a square."""
    size = math.prod(shape)
    if size <= WHOLE:
        return 1
    columns = shape[-1] if shape[-1] > 1 and len(shape) > 1 else math.isqrt(size)
    steps = range(min(size // columns, columns) - 1, 1, -1)
    return next((step for step in steps if math.gcd(step, columns) == 1), 1)
