"""A safetensors file written block by block."""

import os
import threading

import torch
from safetensors.torch import load_file

from chatmagic.models.shard import Part, write_shard


def test_the_disk_takes_a_shard_while_it_is_made(tmp_path, monkeypatch):
    """The tensor is there only once the file was flushed, which at the end alone would be too late."""
    weight, flushed, fsync = torch.randn(3, 4), threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), flushed.set()))

    def rows():
        assert flushed.wait(10), "nothing was flushed while a tensor was still to come"
        return weight

    write_shard(tmp_path / "one.safetensors", {"weight": Part(weight.dtype, tuple(weight.shape), rows)})
    assert torch.equal(load_file(tmp_path / "one.safetensors")["weight"], weight)
