"""Defaults for every option, for loops that can only name the backend.

A torch config module: set ``flashnorm_compile.config.max_grad_norm = 1.0``, use ``config.patch(max_grad_norm=1.0)``
around a compilation, or set ``FLASHNORM_MAX_GRAD_NORM=1.0`` (read once, at import). ``options`` always win.
Environment variables hold JSON (numbers, ``null``, objects); text that is not JSON is taken as it stands.
Values are checked by ``Options.parse``, not here, so that one place words the errors.
"""

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from torch.utils._config_module import install_config_module

if TYPE_CHECKING:
    from torch.utils._config_typing import *  # noqa: F403


def _environment(name: str, default: Any = None) -> Any:
    text = os.environ.get("FLASHNORM_" + name.upper())
    if text is None:
        return default
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


max_grad_norm: Any = _environment("max_grad_norm")
noise_multiplier: Any = _environment("noise_multiplier")
clipping: Any = _environment("clipping", "flat")
groups: Any = _environment("groups")
stability_constant: Any = _environment("stability_constant", 0.01)
loss_reduction: Any = _environment("loss_reduction", "mean")
expected_batch_size: Any = _environment("expected_batch_size")
accumulation_steps: Any = _environment("accumulation_steps", 1)
loss_normalizer: Any = _environment("loss_normalizer")
batch_dims: Any = _environment("batch_dims")
seed: Any = _environment("seed")
norm_algorithm: Any = _environment("norm_algorithm", "auto")
memory_budget: Any = _environment("memory_budget", 1.1)
inductor: Any = _environment("inductor")

# A directory for graphs and plans, written at compile time. Nothing is written when it is unset.
dump: str | None = os.environ.get("FLASHNORM_DUMP") or None

install_config_module(sys.modules[__name__])
