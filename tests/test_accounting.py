"""Epsilon and calibration against dp-accounting called directly and against published values; what a history counts."""

from __future__ import annotations

import json
import math
import pickle
import random
import sys
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting import NeighboringRelation, dp_event, pld, rdp
from flashnorm_compile.passes.errors import OptionsError, PrivacyError
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from stand_in import Private, weights
from torch import nn

from flashnorm_compile import calibrate, privacy
from flashnorm_compile.accounting import History, Mechanism, Release, Sampling, calibrate_steps, planned_epsilon, spent
from flashnorm_compile.accounting.account import Account, Batch
from flashnorm_compile.accounting.accountant import epsilon_of
from flashnorm_compile.accounting.calibrate import _last
from flashnorm_compile.state import PrivacyState

POISSON = Sampling("poisson", 0.01, 1000)
X = torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]])


def plan(noise: float, rate: float | None, steps: int, delta: float, **changes: Any) -> float:
    return planned_epsilon(noise_multiplier=noise, sample_rate=rate, steps=steps, delta=delta, **changes)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "published"),
    [(1.5, 0.001, 20000, 0.437005108), (2.0, 0.05, 1000, 4.172799867), (0.8, 0.001, 1000, 0.477771266)],
)
def test_pld_agrees_with_numerical_composition(noise: float, rate: float, steps: int, published: float) -> None:
    """Upper bounds on epsilon at delta 1e-6 by Gopi, Lee, Wutschitz, "Numerical Composition of Differential Privacy" (2021).

    The numbers are the reference values in Opacus 1.6, opacus/tests/prv_accountant.py, made with that method's eps_error
    of 0.01: the exact value is at most twice that below them.
    """
    assert published - 0.02 <= plan(noise, rate, steps, 1e-6) <= published


def test_rdp_gives_a_published_value() -> None:
    """Opacus 1.6, opacus/tests/accountants_test.py, with orders of its own: ours may differ in the last digits only."""
    assert plan(1.5, 0.04, 2250, 1e-5, accountant="rdp") == pytest.approx(7.32911117143, rel=2e-3)


def test_pld_gives_the_exact_delta_of_koskela() -> None:
    """Koskela, Jalko, Honkela, "Computing Tight Differential Privacy Guarantees Using FFT" (2020): delta(1) = 0.15594."""
    assert plan(0.5, 0.2, 3, 0.15594) == pytest.approx(1.0, abs=1e-3)


def test_abadi_bound_holds() -> None:
    """Abadi et al., "Deep Learning with Differential Privacy" (2016), section 3.2: at most 1.26 for q 0.01, sigma 4, E 100."""
    tight, moments = plan(4.0, 0.01, 10000, 1e-5), plan(4.0, 0.01, 10000, 1e-5, accountant="rdp")
    assert 0.9 < tight < moments < 1.26


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("truncated", [None, 130])
def test_pld_equals_dp_accounting(relation: Any, truncated: int | None) -> None:
    event: Any = dp_event.PoissonSampledDpEvent(0.01, dp_event.GaussianDpEvent(3.0))
    if truncated:
        event = dp_event.TruncatedSubsampledGaussianDpEvent(10000, 0.01, truncated, 3.0)
    direct = pld.PLDAccountant(NeighboringRelation[relation.upper()]).compose(event, 100).get_epsilon(1e-6)
    sizes = {"dataset_size": 10000, "truncated_batch_size": truncated} if truncated else {}
    assert plan(3.0, 0.01, 100, 1e-6, relation=relation, **sizes) == pytest.approx(direct, rel=1e-9)


def test_rdp_equals_dp_accounting() -> None:
    event = dp_event.PoissonSampledDpEvent(0.01, dp_event.GaussianDpEvent(1.1))
    direct = rdp.RdpAccountant().compose(event, 100).get_epsilon(1e-6)
    assert plan(1.1, 0.01, 100, 1e-6, accountant="rdp") == direct


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_replacing_a_record_doubles_the_sensitivity(accountant: Any) -> None:
    """dp-accounting's RDP gives a Gaussian event the same cost under every relation; the sum moves by 2C all the same."""
    replaced = plan(2.0, None, 10, 1e-5, accountant=accountant, relation="replace_one")
    assert replaced == pytest.approx(plan(1.0, None, 10, 1e-5, accountant=accountant), rel=1e-9)
    direct = pld.PLDAccountant(NeighboringRelation.REPLACE_ONE).compose(dp_event.GaussianDpEvent(2.0), 10).get_epsilon(1e-5)
    assert plan(2.0, None, 10, 1e-5, relation="replace_one") == pytest.approx(direct, rel=1e-4)


@pytest.mark.parametrize("noise", [0.003, 0.02])
def test_hardly_any_noise_neither_hangs_nor_flatters(noise: float) -> None:
    """Plain dp-accounting asks for more memory than there is here.

    So little noise hides nothing: a record that was drawn k times costs about k / (2 noise**2), and k is binomial.
    """
    low, high = (stats.binom.isf(tail, 1000, 0.01) / (2 * noise**2) for tail in (1e-4, 1e-6))
    assert 0.9 * low <= plan(noise, 0.01, 1000, 1e-5) <= 1.1 * high


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_extreme_noise_is_bounded_from_above(accountant: Any) -> None:
    """Floats run over in plain dp-accounting."""
    assert plan(1e-200, 0.01, 10, 1e-5, accountant=accountant) == math.inf
    assert plan(1e-3, 0.5, 10**6, 1e-5, accountant=accountant) == math.inf
    assert 0 <= plan(1e200, 0.01, 10, 1e-5, accountant=accountant) <= 2e-3
    several = {Mechanism(noise, Sampling("poisson", 0.5)): 10**6 for noise in (1e7, 1e8)}
    assert epsilon_of(several, 1e-5, accountant) == plan(1e6, 0.5, 2 * 10**6, 1e-5, accountant=accountant)


def test_noise_of_every_step_its_own_is_bounded_from_above() -> None:
    schedule = {Mechanism(4.0 + step / 100, POISSON): 1 for step in range(100)}
    got = epsilon_of(schedule, 1e-5)
    exact = pld.PLDAccountant()
    for mechanism in schedule:
        exact.compose(dp_event.PoissonSampledDpEvent(0.01, dp_event.GaussianDpEvent(mechanism.noise_multiplier)))
    assert exact.get_epsilon(1e-5) <= got <= 1.02 * exact.get_epsilon(1e-5)


def test_no_noise_is_no_privacy_and_no_release_costs_nothing() -> None:
    assert plan(0.0, 0.01, 1, 1e-5) == math.inf
    assert plan(1.0, 0.01, 0, 1e-5) == 0.0


@given(
    noise=st.floats(1.5, 6.0),
    rate=st.floats(0.001, 0.2),
    steps=st.integers(1, 200),
    factor=st.floats(1.01, 3.0),
    accountant=st.sampled_from(["pld", "rdp"]),
    delta=st.sampled_from([1e-5, 1e-7]),
)
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
def test_epsilon_is_monotone(noise: float, rate: float, steps: int, factor: float, accountant: Any, delta: float) -> None:
    base = plan(noise, rate, steps, delta, accountant=accountant)
    slack = 1e-9 + 1e-6 * base
    assert plan(noise, rate, math.ceil(steps * factor), delta, accountant=accountant) >= base - slack
    assert plan(noise * factor, rate, steps, delta, accountant=accountant) <= base + slack
    assert plan(noise, min(rate * factor, 1.0), steps, delta, accountant=accountant) >= base - slack


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps", "changes"),
    [
        (0.4, 0.02, 300, {}),
        (3.0, None, 50, {}),
        (3.0, None, 50, {"relation": "replace_one"}),
        (2.0, 0.02, 300, {"accountant": "rdp"}),
        (2.0, None, 300, {"accountant": "rdp", "relation": "replace_one"}),
        (0.1, 0.01, 20, {"truncated_batch_size": 130, "dataset_size": 10000}),
        (200.0, 0.3, 10, {"accountant": "rdp"}),
    ],
)
def test_calibrated_noise_keeps_the_budget(epsilon: float, rate: float | None, steps: int, changes: dict[str, Any]) -> None:
    noise = calibrate(epsilon=epsilon, delta=1e-5, sample_rate=rate, steps=steps, **changes)
    assert plan(noise, rate, steps, 1e-5, **changes) <= epsilon
    assert plan(0.995 * noise, rate, steps, 1e-5, **changes) > epsilon


def test_calibrate_equals_dp_accounting() -> None:
    def event(noise: float) -> Any:
        return dp_event.SelfComposedDpEvent(dp_event.PoissonSampledDpEvent(0.01, dp_event.GaussianDpEvent(noise)), 100)

    interval = dp_accounting.ExplicitBracketInterval(1.0, 3.0)
    direct = dp_accounting.calibrate_dp_mechanism(pld.PLDAccountant, event, 0.2, 1e-5, interval, tol=1e-3)
    assert calibrate(epsilon=0.2, delta=1e-5, sample_rate=0.01, steps=100) == pytest.approx(direct, rel=3e-3)


def test_calibrated_steps_keep_the_budget() -> None:
    steps = calibrate_steps(epsilon=2.0, delta=1e-5, sample_rate=0.02, noise_multiplier=1.0, accountant="rdp")
    assert plan(1.0, 0.02, steps, 1e-5, accountant="rdp") <= 2.0 < plan(1.0, 0.02, steps + 1, 1e-5, accountant="rdp")
    assert calibrate_steps(epsilon=2.0, delta=1e-5, sample_rate=0.1, noise_multiplier=0.3) == 0


@given(truth=st.integers(0, 10**7), start=st.integers(0, 10**7))
def test_the_search_for_steps_ends_at_the_last_that_fits(truth: int, start: int) -> None:
    assert _last(lambda steps: steps <= truth, start) == (truth, truth + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": math.nan}, r"epsilon must be a finite number > 0; got nan"),
        ({"delta": 1.0}, r"delta must be > 0 and < 1"),
        ({"delta": 0}, r"delta must be a finite number > 0"),
        ({"steps": 0}, r"steps must be an integer >= 1"),
        ({"steps": 10**7 + 1}, r"steps must be an integer >= 1 and <= 10,000,000"),
        ({"sample_rate": 1.5}, r"sample_rate must be a probability > 0 and <= 1; got 1\.5"),
        ({"truncated_batch_size": 10}, r"truncated_batch_size=10 also needs sample_rate and dataset_size"),
        ({"accountant": "prv"}, r"accountant must be 'pld' or 'rdp'; got 'prv'"),
        ({"relation": "swap"}, r"relation must be 'add_or_remove_one' or 'replace_one'; got 'swap'"),
        ({"accountant": "rdp", "relation": "replace_one"}, r"RDP accountant cannot account .* Use accountant='pld'"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.01, "steps": 10, **changes}
    with pytest.raises(PrivacyError, match=message):
        calibrate(**arguments)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"pip install 'flashnorm_compile\[accounting\]'"):
        plan(1.2345, 0.01, 10, 1e-5)


def release(noise: float = 1.0, draw: int | None = None, stream: str = "s") -> Release:
    return Release(Mechanism(noise, None if draw is None else POISSON), None if draw is None else (stream, draw))


def test_two_releases_of_one_draw_are_one_mechanism() -> None:
    history = History()
    for draw in [0, 1, 2, 2, 3, 1]:
        history.add(release(draw=draw))
    assert history.releases == 6
    assert history.mechanisms() == {Mechanism(1.0, POISSON): 2, Mechanism(0.5**0.5, POISSON): 2}
    history.add(release(draw=1, stream="another"))
    assert history.mechanisms()[Mechanism(1.0, POISSON)] == 3


def test_history_equals_a_dictionary_of_draws() -> None:
    """Spans are only a short way to write down noise**-2, summed for each draw."""
    generator = random.Random(1)
    history, precisions, draw = History(), {}, 0
    for step in range(400):
        draw = generator.choice([draw + 1, draw + 1, draw + 2, draw, generator.randrange(draw + 1)])
        noise = [1.0, 2.0][step // 100 % 2]
        history.add(release(noise, draw))
        precisions[draw] = precisions.get(draw, 0.0) + noise**-2
        if step % 97 == 0:
            history = History.from_plain(json.loads(json.dumps(history.to_plain())))
    got = sorted(m.noise_multiplier for m in history.mechanisms().elements())
    assert got == pytest.approx(sorted(p**-0.5 for p in precisions.values()))
    assert history.releases == 400


def test_long_histories_stay_short() -> None:
    history = History()
    for draw in range(5000):
        history.add(release(1.0 if draw < 3000 else 2.0, draw))
    for _ in range(1000):
        history.add(release())
    assert len(history.spans) == 3
    assert len(json.dumps(history.to_plain())) < 1000


def batch(draw: int, part: int = 0, last: bool = True) -> Batch:
    return Batch(POISSON, "s", draw, part, last)


def recorded(*passes: Batch | None) -> Release:
    """What one release after these backward passes is recorded as."""
    account = Account()
    for one in passes:
        if one is None:
            account.count_pass(sums_wait=True)
        else:
            with account.on(one):
                account.count_pass(sums_wait=True)
    return account._release(1.0)


def test_sensitivity_of_what_went_into_a_release() -> None:
    assert recorded(batch(0, 0, False), batch(0, 1)) == Release(Mechanism(1.0, POISSON), ("s", 0), 2)
    twice = recorded(batch(0, 0, False), batch(0, 0, False), batch(0, 1))
    assert twice == Release(Mechanism(0.5, POISSON), ("s", 0), 3)  # a sample of part 0 counts twice
    assert recorded(batch(0), batch(1)) == Release(Mechanism(0.5), None, 2)  # a record may be in both draws
    assert recorded(None, None, None) == Release(Mechanism(1.0), None, 3)
    assert recorded(None, batch(3)) == Release(Mechanism(0.5), None, 2)


def test_unknown_sampler_is_not_credited() -> None:
    graph = Private(*weights(1), noise_multiplier=2.0)
    for _ in range(5):
        graph(X).backward()
    state = graph.binding.state
    assert state.steps == 5
    assert state.epsilon(1e-5) == pytest.approx(plan(2.0, None, 5, 1e-5))
    report = state.spent(1e-5, sample_rate=0.01)
    assert report.epsilons == {1e-5: state.epsilon(1e-5)}
    assert report.assumed_epsilons == {1e-5: pytest.approx(plan(2.0, 0.01, 5, 1e-5))}
    lines = str(report).splitlines()
    (without,) = [line for line in lines if line.startswith("Without amplification: epsilon = ")]
    (amplified,) = [line for line in lines if line.startswith("With amplification: epsilon = ")]
    assert "however batches were drawn" in without
    assert "independent Poisson draw at rate 0.01" in amplified
    assert "With amplification: not computed, because the sample rate is not known" in str(state.spent(1e-5))


def test_statement() -> None:
    history = History()
    for draw in range(10):
        history.add(release(1.1, draw))
    text = str(spent(history, 1e-5, 1e-6))
    epsilon = plan(1.1, 0.01, 10, 1e-5)
    for part in (
        "10 releases of clipped gradient sums",
        "Gaussian mechanism, noise multiplier 1.1",
        "Unit of privacy: one record",
        "Neighboring relation: adding or removing one record",
        "Sampler: Poisson, rate 0.01 of 1000 records (10 draws)",
        f"PLD of dp-accounting {dp_accounting.__version__ if hasattr(dp_accounting, '__version__') else ''}",
        "at delta = 1e-05",
        "at delta = 1e-06",
        "single run",
    ):
        assert part in text
    assert "amplification" not in text
    shown = float(text.split("epsilon = ")[1].split()[0])
    assert epsilon <= shown <= epsilon * 1.001
    assert json.loads(json.dumps(spent(history, 1e-5).to_dict()["releases"])) == 10


def test_statement_names_what_is_not_covered() -> None:
    model = nn.ParameterList(weights(2))
    graph, state = Private(*model, noise_multiplier=0.0, seed=3), privacy(model)
    state.exempt("0")
    graph(X).backward()
    text = str(state.spent(1e-5))
    assert "epsilon = infinite (no privacy)" in text
    assert "made with a seed" in text
    assert "1 parameters that were exempted from protection, such as 0" in text


def test_changed_noise_micro_batches_and_resumed_runs_are_counted() -> None:
    model = nn.ParameterList(weights(1))
    graph, state = Private(*model, noise_multiplier=1.0), privacy(model)
    graph(X).backward()
    with state.accumulate():
        graph(X).backward()
        graph(X).backward()
    state.noise_multiplier = 2.0
    graph(X).backward()
    assert state.account.history.mechanisms() == {Mechanism(1.0): 1, Mechanism(2.0): 1}
    assert state.account.history.micro_batches == 4
    resumed = PrivacyState()
    resumed.load_state_dict(pickle.loads(pickle.dumps(state.state_dict())))
    assert resumed.steps == 2
    assert resumed.epsilon(1e-5) == state.epsilon(1e-5)
    graph(X).backward()
    assert state.epsilon(1e-5) > resumed.epsilon(1e-5)


def test_sums_that_a_noised_pass_left_behind_count_for_the_next_draw() -> None:
    """The second branch still holds draw 0 when draw 1 is released: a record of both may count twice."""
    model = nn.ParameterList(weights(2))
    state = privacy(model)
    one, two = (Private(p, noise_multiplier=1.0) for p in model)
    with state.using(batch(0, 0, False)):
        one(X).backward()
        two(X).backward()
    with state.using(batch(0, 1)):
        one(X).backward()
    with state.using(batch(1)):
        two(X).backward()
    assert Mechanism(1.0, POISSON) not in state.account.history.mechanisms()
    assert state.account.history.releases == 2


def test_loader_and_accumulation_steps_contradict_each_other() -> None:
    graph = Private(*weights(1), accumulation_steps=2)
    with graph.binding.state.using(batch(0)), pytest.raises(OptionsError, match="the loader decides which backward pass"):
        graph(X).backward()
