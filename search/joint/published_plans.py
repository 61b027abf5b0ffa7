"""Plans that papers printed for large models: baselines of a search for the same model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from simulator.plan_sections import SCHEDULES_TWO_CHUNKS


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedPlan:
    """What a paper says of how a model was split; data parallelism takes the devices that are left, the micro-batch is one sample in all of them."""

    name: str
    source: str
    """Paper and table or section; what it leaves open, and how it is taken here."""
    tp: int
    pp: int
    zero_stage: int
    recompute: str
    sequence_parallel: bool
    cp: int = 1
    ep: int = 1
    schedule: str = "1f1b"
    chunks: tuple[int, ...] = (1,)
    """Of a rank; several where the paper does not say: the fastest counts."""
    spared_ends: int = 0
    """Layers that the first and the last stage each hold fewer than the others."""
    seq_len: int | None = None
    """Tokens per sample for which it is meant; None: any."""

    def schedule_of(self, chunks: int) -> str:
        """Schedule at a number of chunks: several need an interleaved one."""
        return "interleaved" if chunks > 1 and self.schedule not in SCHEDULES_TWO_CHUNKS else self.schedule

    def partition(self, layers: int, chunks: int) -> tuple[int, ...] | None:
        """Layers of each stage; None: equal ones, or the simulator's own cut where they cannot be."""
        if not self.spared_ends:
            return None
        stages = self.pp * chunks
        each, rest = divmod(layers + 2 * self.spared_ends, stages)
        if rest or each < self.spared_ends:
            return None
        return (each - self.spared_ends, *(each,) * (stages - 2), each - self.spared_ends)


_LLAMA = "Dubey et al. 2024 (arXiv 2407.21783), table 4 and section 3.3.2: FSDP shards optimizer states and gradients, parameters are not gathered again; first and last stage one layer fewer; chunks are not printed; recompute is not named"

PUBLISHED: Mapping[str, tuple[PublishedPlan, ...]] = MappingProxyType(
    {
        "gpt3-175b": (
            PublishedPlan(
                name="published plan, SC'21", tp=8, pp=12, chunks=(4,), zero_stage=0, recompute="full", sequence_parallel=False,
                source="Narayanan et al. 2021 (arXiv 2104.04473), table 2; chunks of two layers: Megatron-LM, examples/sc21/run_figure_12.sh",
            ),
            PublishedPlan(
                name="published plan, selective recompute", tp=8, pp=8, chunks=(3,), zero_stage=0, recompute="selective", sequence_parallel=True,
                source="Korthikanti et al. 2022 (arXiv 2205.05198), table 3",
            ),
        ),
        "megatron-530b": (
            PublishedPlan(
                name="published plan, MT-NLG", tp=8, pp=35, zero_stage=0, recompute="full", sequence_parallel=False,
                source="Smith et al. 2022 (arXiv 2201.11990), sections 2.2 and 2.4; ZeRO and the micro-batch are not printed: none, and one sample",
            ),
            PublishedPlan(
                name="published plan, selective recompute", tp=8, pp=35, chunks=(3,), zero_stage=0, recompute="selective", sequence_parallel=True,
                source="Korthikanti et al. 2022 (arXiv 2205.05198), table 3",
            ),
        ),
        "llama3-405b": (
            PublishedPlan(
                name="published plan, 8,192 tokens", tp=8, pp=16, chunks=(1, 2, 4, 8), zero_stage=2, recompute="none", sequence_parallel=True,
                spared_ends=1, seq_len=8192, source=_LLAMA,
            ),
            PublishedPlan(
                name="published plan, 131,072 tokens", tp=8, cp=16, pp=16, chunks=(1, 2, 4, 8), zero_stage=2, recompute="none", sequence_parallel=True,
                spared_ends=1, seq_len=131072, source=_LLAMA,
            ),
        ),
        "deepseek-v3": (
            PublishedPlan(
                name="published plan", tp=1, pp=16, ep=64, schedule="dualpipe", zero_stage=1, recompute="none", sequence_parallel=False,
                source="DeepSeek-AI 2024 (arXiv 2412.19437), section 3.2; norms and up-projections, which it recomputes, are kept here, and products are in the request's format",
            ),
        ),
    }
)  # fmt: skip
"""By the preset's name."""
