"""Which of this project's kernels and operators generated code runs, and how often."""

from __future__ import annotations

import re
from collections import Counter

from benchmarks.hopper.generate import Generated

_IMPORT = re.compile(r"from flashnorm_compile\.templates\.([a-z]\w*) import")
_OPERATOR = "torch.ops.flashnorm."


def calls_of_ours(generated: Generated) -> Counter[str]:
    """Runs of each kernel of `templates` (by the module that it comes from, or by its name) and of each `flashnorm::` operator."""
    found: Counter[str] = Counter()
    for one in generated.graphs:
        for name, source in one.kernels:
            modules = _IMPORT.findall(source)
            if modules:
                found[modules[0]] += len(re.findall(rf"\b{name}\.run\(", one.code))
        for called, count in one.library_calls.items():
            if called.startswith(_OPERATOR):
                found[called.removeprefix(_OPERATOR).removesuffix(".default")] += count
        for name in re.findall(r"\b(add_noise_kernel|weighted_sum_noise_kernel)\w*\.run\(", one.code):
            found[name.removesuffix("_kernel")] += 1
    return found
