"""Everybody that is measured. The order is that of the runs and of the tables."""

from benchmarks.contenders.base import CannotRunError, Contender, Prepared, Privacy
from benchmarks.contenders.book_keeping import BookKeeping
from benchmarks.contenders.fastdp import FastDP
from benchmarks.contenders.jax_privacy import JaxPrivacy
from benchmarks.contenders.loop import Loop
from benchmarks.contenders.nonprivate import NonPrivate
from benchmarks.contenders.opacus import Opacus
from benchmarks.contenders.ours import Ours
from benchmarks.contenders.two_pass import TwoPass
from benchmarks.contenders.vmap import Vmap

BASELINE = "inductor"
EAGER = "eager"

CONTENDERS: tuple[Contender, ...] = (
    NonPrivate(BASELINE, compiled=True),
    NonPrivate(EAGER, compiled=False),
    Ours("flashnorm"),
    Ours("flashnorm per-layer", clipping="per_layer"),
    Ours("flashnorm ghost", norm_algorithm="ghost"),
    Ours("flashnorm materialize", norm_algorithm="materialize"),
    Opacus("opacus", "hooks"),
    Opacus("opacus functorch", "functorch"),
    Opacus("opacus ghost", "ghost"),
    Opacus("opacus fast gradient", "fast gradient"),
    TwoPass(),
    BookKeeping(),
    FastDP(),
    Vmap("vmap", compiled=False),
    Vmap("vmap compiled", compiled=True),
    Loop("loop", compiled=False),
    Loop("loop compiled", compiled=True),
    JaxPrivacy(),
)

__all__ = ["BASELINE", "CONTENDERS", "EAGER", "CannotRunError", "Contender", "Prepared", "Privacy"]
