"""What a soak runs beside its all-reduces: matrix products, NCCL, and ranks that stall."""

from __future__ import annotations

import random
import time

import torch
import torch.distributed as dist

from ..torch_private import keep_gpu_busy


class MatrixProducts:
    """Matrix products that keep every SM busy, on a stream of their own."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.a, self.b, self.c = (torch.randn(4096, 4096, dtype=torch.bfloat16, device=device) for _ in range(3))
        self.done = [torch.cuda.Event() for _ in range(2)]
        self.next = self.products = 0

    def feed(self) -> None:
        """Keep two batches in the queue."""
        while self.done[self.next].query():
            with torch.cuda.stream(self.stream):
                for _ in range(4):
                    torch.mm(self.a, self.b, out=self.c)
                self.done[self.next].record()
            self.next = 1 - self.next
            self.products += 4


class NcclTraffic:
    """NCCL all-reduces on a stream and in a group of their own."""

    def __init__(self, device: torch.device):
        self.group = dist.new_group(backend="nccl")
        self.stream = torch.cuda.Stream(device)
        self.buffer = torch.zeros(1 << 18, device=device)
        self.calls = 0
        self.enqueue(1)
        self.stream.synchronize()

    def enqueue(self, count: int) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(count):
                dist.all_reduce(self.buffer, group=self.group)
        self.calls += count


class Stalls:
    """Pauses of this rank alone, at random, of the host and of its GPU; none if not ``wanted``."""

    def __init__(self, wanted: bool, seed: str, on_gpu: bool):
        self.wanted, self.on_gpu = wanted, on_gpu
        self.dice = random.Random(seed)
        self.count = 0

    def before_call(self) -> None:
        if self.wanted and self.dice.random() < 0.005:
            if self.on_gpu:
                self.count += 1
                keep_gpu_busy(int(10 ** self.dice.uniform(3, 6)))  # up to half a millisecond
            else:
                self._host()

    def before_replay(self) -> None:
        if self.wanted and self.dice.random() < 0.05:
            self._host()

    def _host(self) -> None:
        self.count += 1
        time.sleep(10 ** self.dice.uniform(-5, -1.5))
