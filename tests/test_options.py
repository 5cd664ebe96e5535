"""Options are checked, named in errors, and merged over the config module."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
from flashnorm_compile.passes.errors import OptionsError

from flashnorm_compile import config
from flashnorm_compile.options import Options

GOOD: dict[str, Any] = {"max_grad_norm": 1, "noise_multiplier": 0.8}


def test_defaults() -> None:
    parsed = Options.parse(GOOD)
    assert parsed == Options(max_grad_norm=1.0, noise_multiplier=0.8)
    assert isinstance(parsed.max_grad_norm, float)
    assert parsed.clipping == "flat"


@pytest.mark.parametrize("given", [None, {}, {"max_grad_norm": 1.0}, {"noise_multiplier": 0.0}])
def test_privacy_options_are_required(given: dict[str, Any] | None) -> None:
    with pytest.raises(OptionsError, match=r"Missing: .*FLASHNORM_MAX_GRAD_NORM.*noise_multiplier=0\.0 .* is allowed"):
        Options.parse(given)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"max_norm": 1.0}, r"Unknown option 'max_norm' \(did you mean 'max_grad_norm'\?\)\. Allowed: max_grad_norm, "),
        ({"mode": "x"}, r"Settings for Inductor itself go into"),
        ({"max_grad_norm": math.nan}, r"max_grad_norm must be a finite number > 0; got nan of type float"),
        ({"max_grad_norm": 0}, r"finite number > 0; got 0"),
        ({"max_grad_norm": math.inf}, r"finite number > 0; got inf"),
        ({"max_grad_norm": True}, r"got True of type bool"),
        ({"max_grad_norm": "1"}, r"got '1' of type str"),
        ({"noise_multiplier": -0.1}, r"noise_multiplier must be a finite number >= 0; got -0\.1"),
        ({"noise_multiplier": math.nan}, r"noise_multiplier must be .* got nan"),
        ({"clipping": "per-layer"}, r"one of 'flat', 'per_layer', .*did you mean 'per_layer'"),
        ({"clipping": "group"}, r"contradict each other"),
        ({"groups": {"*": 1.0}}, r"contradict each other"),
        ({"clipping": "group", "groups": {"a": 0.6, "*": 0.9}}, r"combine to .* = 1\.08167, but max_grad_norm is 1"),
        ({"clipping": "group", "groups": {"a": math.nan}}, r"groups\['a'\] must be a finite number > 0.*got nan"),
        ({"stability_constant": 0}, r"stability_constant must be"),
        ({"loss_reduction": "avg"}, r"loss_reduction must be one of 'mean', 'sum'"),
        ({"expected_batch_size": 0}, r"expected_batch_size must be"),
        ({"accumulation_steps": 0}, r"accumulation_steps must be an integer >= 1; got 0"),
        ({"accumulation_steps": 2.0}, r"an integer >= 1; got 2\.0 of type float"),
        ({"loss_normalizer": math.nan}, r"loss_normalizer must be"),
        ({"batch_dims": {"x": "0"}}, r"batch_dims\['x'\] must be an integer; got '0'"),
        ({"batch_dims": [0]}, r"batch_dims must be a dict from input names"),
        ({"seed": True}, r"seed must be an integer"),
        ({"norm_algorithm": "gost"}, r"norm_algorithm must be .*did you mean 'ghost'"),
        ({"norm_algorithm": {"*": "tensor"}}, r"norm_algorithm\['\*'\] must be one of"),
        ({"inductor": "max_autotune"}, r"inductor must be a dict"),
    ],
)
def test_refusals(change: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionsError, match=text):
        Options.parse({**GOOD, **change})


def test_everything_at_once() -> None:
    parsed = Options.parse(
        {
            **GOOD,
            "clipping": "group",
            "groups": {"embed.*": 0.6, "*": 0.8},
            "batch_dims": {"x": 1, "mask": None},
            "norm_algorithm": {"head.*": "ghost", "*": "auto"},
            "seed": 3,
            "inductor": {"max_autotune": True},
        }
    )
    assert parsed.groups == {"embed.*": 0.6, "*": 0.8}
    assert parsed.batch_dims == {"x": 1, "mask": None}


def test_config_is_weaker_than_options() -> None:
    with config.patch(max_grad_norm=2.0, noise_multiplier=0.5, clipping="per_layer"):
        assert Options.parse().max_grad_norm == 2.0
        parsed = Options.parse({"max_grad_norm": 3.0})
        assert (parsed.max_grad_norm, parsed.noise_multiplier, parsed.clipping) == (3.0, 0.5, "per_layer")
    with pytest.raises(OptionsError, match="Missing"):
        Options.parse()


def test_config_values_are_checked() -> None:
    with config.patch(max_grad_norm=math.nan, noise_multiplier=1.0), pytest.raises(OptionsError, match="got nan"):
        Options.parse()


def test_environment() -> None:
    """A noise multiplier of 1 must arrive as a number, although torch's config modules read "1" as True."""
    variables = {
        "FLASHNORM_MAX_GRAD_NORM": "2.5",
        "FLASHNORM_NOISE_MULTIPLIER": "1",
        "FLASHNORM_CLIPPING": "group",
        "FLASHNORM_GROUPS": '{"*": 2.5}',
        "FLASHNORM_BATCH_DIMS": '{"mask": null}',
        "FLASHNORM_DUMP": "somewhere",
    }
    program = (
        "from flashnorm_compile import config\n"
        "from flashnorm_compile.options import Options\n"
        "o = Options.parse()\n"
        "assert (o.max_grad_norm, o.noise_multiplier, o.clipping) == (2.5, 1.0, 'group'), o\n"
        "assert o.groups == {'*': 2.5} and o.batch_dims == {'mask': None}, o\n"
        "assert config.dump == 'somewhere'\n"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **variables}, check=True)


def test_graph_key_follows_the_graph_only() -> None:
    key = Options.parse(GOOD).graph_key()
    assert key == Options.parse({**GOOD, "max_grad_norm": 9.0, "clipping": "per_layer", "seed": 1}).graph_key()
    changes: list[dict[str, Any]] = [
        {"loss_normalizer": 4},
        {"loss_reduction": "sum"},
        {"batch_dims": {"x": 1}},
        {"norm_algorithm": "ghost"},
        {"norm_algorithm": {"a*": "ghost", "*": "auto"}},
        {"norm_algorithm": {"*": "auto", "a*": "ghost"}},
    ]
    keys = [Options.parse({**GOOD, **change}).graph_key() for change in changes]
    assert len({key, *keys}) == len(changes) + 1
