"""Run by test_cache in processes of their own: one step of a small model, its gradients and cache counters.

As a program it reads its arguments from JSON and writes JSON; forked from a server that has imported everything it is much faster,
but shares the server's hash seed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from models.algebra import CASES
from oracle import gradients_of
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config


def step(backend: str, options: dict[str, Any]) -> dict[str, Any]:
    """Compiles the zoo's ``mlp_over_time`` with ``options`` and takes its gradients."""
    inductor_config.fx_graph_cache = functorch_config.enable_autograd_cache = True
    # In a fresh directory it would compile half a dozen programs to find out which vector instructions there are.
    inductor_config.cpp.vec_isa_ok = False
    (case,) = (case for case in CASES if case.name == "mlp_over_time")
    model, inputs, targets = case.make()
    compiled = torch.compile(model, backend=backend, options=options or None)
    case.loss(compiled(**inputs), targets).backward()
    counters = torch._dynamo.utils.counters
    return {
        "gradients": {name: value.tolist() for name, value in gradients_of(model).items()},
        "fx_hits": counters["inductor"]["fxgraph_cache_hit"],
        "fx_misses": counters["inductor"]["fxgraph_cache_miss"],
        "aot_hits": counters["aot_autograd"]["autograd_cache_hit"],
        "bypasses": counters["inductor"]["fxgraph_cache_bypass"] + counters["aot_autograd"]["autograd_cache_bypass"],
    }


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(step(*json.loads(sys.argv[1]))) + "\n")
