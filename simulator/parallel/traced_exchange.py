"""The exchanges of one rank with its replicas, as instructions: buckets packed on the compute stream, summed beside it, parts gathered after the update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simulator.lower import PassPrices
from simulator.parallel.traced_replicas import Bucket, CollectiveSeconds, Replicas, packing_pass
from simulator.parallel.traced_writer import Change, ProgramWriter
from simulator.program import Kind, MemoryClass, Stream


class Exchange:
    """Issues one rank's exchanges, and counts what gradients take on the way.

    **Model**: a bucket's tensor is made, gradients are copied in and let go (a kernel each), and the ring runs on its own stream. With ZeRO 1 the bucket goes when its part has
    arrived; the optimizer updates parts, and rings bring them together when it is done. What is exchanged behind a pass is waited for after the last one.

    **Source**: torch 2.13, ``torch/csrc/distributed/c10d/reducer.cpp`` (buckets); Rajbhandari et al. 2020 (ZeRO), section 5.1.

    **Not modelled**: that a ring takes cores from compute; that parameters may be gathered behind the next step's passes.

    Args:
        replicas: of the step.
        writer: gets the instructions.
        prices: of the copies.
        rank: of the pipeline.
        seconds: of collectives among replicas.
    """

    def __init__(
        self, replicas: Replicas, writer: ProgramWriter, prices: PassPrices, rank: int, seconds: CollectiveSeconds
    ) -> None:
        self.replicas, self._writer, self._prices, self._rank = replicas, writer, prices, rank
        self._seconds = seconds
        self._sent: dict[Bucket, int] = {}
        """The ring of each bucket that is on its way or has arrived."""
        self._buckets_alive: list[Bucket] = []
        """Whose tensors are let go when all passes are over."""
        self.gradient_bytes = 0
        """What the exchanges add to the gradients that the passes made, by now."""

    def send(self, bucket: Bucket, after: Iterable[int] = (), freed: Iterable[Change] = ()) -> tuple[int, int]:
        """Packs a bucket and lets its ring run; the indices of both."""
        seconds = self._prices.seconds(packing_pass(bucket))
        own, part = sum(bucket.sizes), self.replicas.part_bytes(bucket) if self.replicas.splits else 0
        changes: list[Change] = [
            *freed, (0.0, bucket.size_bytes + part, MemoryClass.GRADIENTS), (seconds, -own, MemoryClass.GRADIENTS)
        ]  # fmt: skip
        packed = self._writer.issue(Kind.REDUCE, self._rank, Stream.COMPUTE, seconds, after=after, label="pack", memory=changes)
        took = self.replicas.reduce_s(bucket, self._seconds)
        ring = self._writer.issue(Kind.TRANSFER, self._rank, Stream.DP, took, after=(packed,), label="reduce")
        self.gradient_bytes += bucket.size_bytes + part - own
        self._sent[bucket] = ring
        if self.replicas.splits:
            self._buckets_alive.append(bucket)
        return packed, ring

    def rest(self, after: Sequence[int]) -> tuple[int, ...]:
        """What the optimizer waits for: the rings behind the passes, then those of the buckets that are left, one after the other."""
        waited = [*after, *self._sent.values()]
        for bucket in self.replicas.buckets[self._rank]:
            if bucket not in self._sent:
                waited = [self.send(bucket, waited, self.waited())[1]]
        return tuple(waited)

    def waited(self) -> list[Change]:
        """Buckets that are let go as the next instruction begins, because their rings are waited for."""
        size = sum(bucket.size_bytes for bucket in self._buckets_alive)
        self._buckets_alive.clear()
        self.gradient_bytes -= size
        return [(0.0, -size, MemoryClass.GRADIENTS)]

    def updated(self, trained: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Elements and bytes of each tensor that the optimizer updates here."""
        if not self.replicas.splits:
            return list(trained)
        return [(self.replicas.part_elements(one), self.replicas.part_bytes(one)) for one in self.replicas.buckets[self._rank]]

    def gather(self, updated: int) -> None:
        """Brings updated parts to all replicas."""
        for bucket in self.replicas.buckets[self._rank] if self.replicas.splits else ():
            took = self.replicas.gather_s(bucket, self._seconds)
            self._writer.issue(Kind.TRANSFER, self._rank, Stream.DP, took, after=(updated,), label="gather")
