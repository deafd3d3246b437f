"""CUDA graphs on the CPU: what is launched while capturing is noted, and at a replay done into the same memory.

As on a GPU, a number that Python worked out while capturing stays what it was, and none may be read off a tensor.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chatmagic.accel import decode


class Graph(TorchDispatchMode):
    replays = 0

    def capture_begin(self, pool=None, capture_error_mode="global"):
        self.launched = []
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        result = operator(*args, **(kwargs or {}))
        self.launched.append((operator, args, kwargs or {}, result))
        return result

    def replay(self):
        Graph.replays += 1
        for operator, args, kwargs, result in self.launched:
            for old, new in zip(tree_leaves(result), tree_leaves(operator(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


def install(monkeypatch):
    """Let models on the CPU be captured."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(decode, "DEVICE", "cpu")
