"""The planner's choice: cheapest within the budget, by exhaustive search; memory as the step really uses it."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from flashnorm_compile.passes import peaks
from flashnorm_compile.passes.choose import Again, Decision, Kept, Way, choose
from models.algebra import Stack
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import flashnorm_compile
from benchmarks.timing import peak_tensor_bytes

OPTIONS: dict[str, Any] = {"max_grad_norm": 1.0, "noise_multiplier": 0.0}


Problem = tuple[list[list[Way]], list[int], list[float], dict[Kept, Again]]


def exhaustive(ways: list[list[Way]], moments: list[int], room: list[float], recipes: dict[Kept, Again]) -> tuple[float, float]:
    """(bytes over the budget, seconds) of the best choice, by trying all: of ways, and of what a second backward starts from."""

    def rerun(wanted: set[Kept], held: set[Kept]) -> tuple[set[Kept], set[Kept]]:
        """(values computed again, values that are there for it)"""
        again, started = set(wanted), set[Kept]()
        while True:
            sources = {source for value in again for source in recipes[value].inputs}
            started = {source for source in sources if source not in recipes or source in held}
            if sources - started <= again:
                return again, started
            again |= sources - started

    def cost(chosen: tuple[int, ...], held: set[Kept]) -> tuple[float, float]:
        picked = [own[j] for own, j in zip(ways, chosen, strict=True)]
        kept = {k for way in picked for k in way.kept}
        again, started = rerun({k for way in picked for k in way.again}, held | kept)
        work = max((recipes[value].work for value in again), default=0.0)
        over = 0.0
        for t, free in enumerate(room):
            own = sum(way.held for way, moment in zip(picked, moments, strict=True) if moment <= t)
            taken = sum(k.nbytes for k in kept | started if k.moment <= t) + (work if t == len(room) - 1 else 0.0)
            over = max(over, own + taken - free)
        return over, sum(way.seconds for way in picked) + sum(recipes[value].seconds for value in again)

    holdable = [value for value, recipe in recipes.items() if recipe.holdable]
    starts = [set(held) for size in range(len(holdable) + 1) for held in itertools.combinations(holdable, size)]
    every = itertools.product(*(range(len(own)) for own in ways))
    return min(cost(chosen, held) for chosen in every for held in starts)


def problem(seed: int) -> Problem:
    """Up to five gradients with up to four ways each; values that several of them keep, and values of the backward, each computed
    from those before it, that some need again; a budget from none to ample."""
    draw = random.Random(seed)
    moments_count = draw.randint(1, 4)
    values = [Kept(f"v{i}", draw.randrange(moments_count), draw.randint(1, 50)) for i in range(4)]
    backward = [Kept(f"g{i}", draw.randrange(moments_count), draw.randint(1, 50)) for i in range(draw.randint(1, 4))]
    recipes = {
        value: Again(
            draw.randint(1, 40) / 10,
            tuple(draw.sample([*values, *backward[:i]], draw.randint(0, 2))),
            draw.choice([0, draw.randint(1, 30)]),
            draw.random() < 0.7,
        )
        for i, value in enumerate(backward)
    }

    def way() -> Way:
        needs = [] if draw.random() < 0.6 else [draw.choice(backward)]
        may_be_kept = [value for value in backward if recipes[value].holdable and value not in needs]
        kept = draw.sample([*values, *may_be_kept], draw.randint(0, 2))
        return Way(draw.randint(1, 100) / 10, draw.choice([0, draw.randint(1, 60)]), tuple(kept), tuple(needs))

    ways = [[way() for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 5))]
    moments = [draw.randrange(moments_count) for _ in ways]
    room = [float(draw.randint(-10, 200)) for _ in range(moments_count)]
    return ways, moments, room, recipes


def test_the_choice_costs_what_exhaustive_search_finds() -> None:
    bound = second = 0
    for seed in range(200):
        ways, moments, room, recipes = problem(seed)
        over, seconds = exhaustive(ways, moments, room, recipes)
        found = choose(ways, moments, room, recipes)
        assert found.over == pytest.approx(over, abs=1e-6), seed
        assert found.seconds == pytest.approx(seconds), seed
        bound += found.seconds > sum(min(way.seconds for way in own) for own in ways) + 1e-9
        second += bool(found.again)
    assert bound > 50, "the budget has to matter in many of them"
    assert second > 50, "so has the second backward"


def test_no_room_at_all_means_no_limit() -> None:
    assert choose([[Way(2.0, 5.0), Way(1.0, 9.0)]], [0], []) == Decision((1,), 1.0, 0.0)


def algorithms(report: dict[str, Any]) -> set[str]:
    return {row["algorithm"] for row in report["parameters"]}


def explained(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Any]:
    return flashnorm_compile.explain(model, x, options=OPTIONS | options).to_dict()


def test_a_budget_changes_the_choice() -> None:
    model, x = Stack(64, 4), torch.randn(8, 24, 64)
    assert algorithms(explained(model, x, memory_budget=100.0)) == {"materialize"}
    held = sum(row["bytes_held"] for row in explained(model, x, memory_budget=1.0)["parameters"])
    assert held < sum(row["bytes_held"] for row in explained(model, x, memory_budget=100.0)["parameters"])


def test_bytes_and_multiples_mean_the_same_budget() -> None:
    model, x = Stack(64, 4), torch.randn(8, 24, 64)
    by_multiple = explained(model, x, memory_budget=1.2)
    by_bytes = explained(model, x, memory_budget=round(1.2 * by_multiple["predicted_peak_bytes"]))
    assert [row["algorithm"] for row in by_multiple["parameters"]] == [row["algorithm"] for row in by_bytes["parameters"]]


def test_alternatives_are_shown_with_their_costs() -> None:
    report = explained(Stack(32, 2), torch.randn(4, 16, 32))
    for row in report["parameters"]:
        assert set(row["considered"]) >= {"materialize", "ghost", "flash"}
        assert row["predicted_us"] == pytest.approx(row["considered"][row["algorithm"]])
    assert report["predicted_ratio"] > 1


def test_what_the_private_step_takes_is_predicted_and_stays_within_the_budget() -> None:
    model, x = Stack(96, 3), torch.randn(6, 160, 96)
    report = explained(model, x, memory_budget=1.25)
    taken = report["predicted_private_peak_bytes"] / report["predicted_peak_bytes"]
    assert 0.9 < taken <= 1.25
    assert taken < explained(model, x, memory_budget=100.0)["predicted_private_peak_bytes"] / report["predicted_peak_bytes"] + 1e-9


@pytest.mark.parametrize("wanted", ["materialize", "ghost", "flash"])
def test_an_algorithm_can_be_asked_for(wanted: str) -> None:
    rows = explained(Stack(32, 2), torch.randn(4, 16, 32), norm_algorithm={"layers.0.*": wanted, "*": "auto"})["parameters"]
    assert rows[0]["algorithm"] == wanted
    assert "asked for" in rows[0]["why"]


def test_an_impossible_algorithm_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    report = explained(model, torch.randn(3, 5, 4), norm_algorithm={"1.weight": "flash", "*": "auto"})
    assert "norm_algorithm={'1.weight': 'flash'} does not fit '1.weight'" in report["refused"]
    assert "'materialize'" in report["refused"]


@pytest.mark.parametrize("value", [0.5, float("nan"), 1, True, "1.1", -3])
def test_a_budget_that_means_nothing_is_refused(value: Any) -> None:
    with pytest.raises(flashnorm_compile.OptionsError, match=r"memory_budget must be a float >= 1\.0"):
        flashnorm_compile.explain(nn.Linear(2, 2), torch.randn(2, 2), options=OPTIONS | {"memory_budget": value})


class Attention(nn.Module):
    """Its forward saves views of the weights, and one value under several names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.down(nn.functional.gelu(self.up(x))).square().mean()


class Tied(nn.Module):
    """Its head's gradient is computed by the call that adds the embedding's: the logits' gradient waits for that."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(words, width), nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.logsumexp(self.layer(self.table(ids)) @ self.table.weight.T, 2).mean()


MODELS = {
    "stack": (Stack(96, 3), torch.randn(6, 160, 96)),
    "attention": (Attention(64), torch.randn(6, 160, 64)),
    "tied": (Tied(1000, 64), torch.randint(1000, (2, 64))),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_predicted_peak_is_what_the_non_private_step_takes(name: str) -> None:
    model, x = MODELS[name]
    predicted = explained(model, x)["predicted_peak_bytes"]
    step = torch.compile(model, dynamic=False)

    def once() -> None:
        step(x).backward()

    once()
    model.zero_grad(set_to_none=True)
    assert predicted == pytest.approx(peak_tensor_bytes(once), rel=0.1)


def test_the_device_is_measured_even_while_a_graph_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning happens in the middle of tracing, where an operator takes no time because nothing is computed."""
    results: list[Any] = []
    monkeypatch.setattr(peaks, "_seconds", lambda call, device: results.append(call()) or 1.0)
    with FakeTensorMode():
        peaks._best("this machine", torch.device("cpu"))
    assert results
    assert not any(isinstance(result, FakeTensor) for result in results)
