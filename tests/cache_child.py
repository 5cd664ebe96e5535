"""Run by test_cache in processes of their own: one step of a small model, its gradients and cache counters as JSON."""

from __future__ import annotations

import json
import sys

import torch
from models.algebra import CASES
from oracle import gradients_of


def main(backend: str, options: str) -> None:
    """Compiles the zoo's ``mlp_over_time`` with ``options`` (JSON; empty for none) and takes its gradients."""
    (case,) = (case for case in CASES if case.name == "mlp_over_time")
    model, inputs, targets = case.make()
    compiled = torch.compile(model, backend=backend, options=json.loads(options) or None)
    case.loss(compiled(**inputs), targets).backward()
    counters = torch._dynamo.utils.counters
    result = {
        "gradients": {name: value.tolist() for name, value in gradients_of(model).items()},
        "fx_hits": counters["inductor"]["fxgraph_cache_hit"],
        "fx_misses": counters["inductor"]["fxgraph_cache_miss"],
        "aot_hits": counters["aot_autograd"]["autograd_cache_hit"],
        "bypasses": counters["inductor"]["fxgraph_cache_bypass"] + counters["aot_autograd"]["autograd_cache_bypass"],
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
