"""Poisson draws, and their delivery in physical batches: statistics, exact zeros, one compilation, resuming."""

from __future__ import annotations

import copy
import math
import multiprocessing
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flashnorm_compile.passes.errors import OptionsError, UnprotectedGradientError
from oracle import assert_agree, clip, double_copy, gradients_of, per_sample_gradients
from scipy import stats
from stand_in import Private, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from flashnorm_compile import PoissonSampler, PrivacyState, privacy, private_dataloader
from flashnorm_compile.accounting import Mechanism, Sampling
from flashnorm_compile.data import PrivateDataLoader

N = 40


def draws(sampler: PoissonSampler, count: int, first: int = 0) -> list[list[int]]:
    return [sampler.draw(number).tolist() for number in range(first, first + count)]


def rejects(observed: list[int], probabilities: list[float]) -> bool:
    """Chi-squared test at 1e-4; cells that are expected fewer than five times are put together."""
    total = sum(observed)
    pairs = sorted(zip(observed, probabilities, strict=True), key=lambda pair: pair[1])
    cells: list[list[float]] = [[0.0, 0.0]]
    for count, probability in pairs:
        if cells[-1][1] >= 5:
            cells.append([0.0, 0.0])
        cells[-1][0] += count
        cells[-1][1] += probability * total
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    return bool(stats.chi2.sf(statistic, max(len(cells) - 1, 1)) < 1e-4)


@pytest.mark.parametrize("rate", [0.03, 0.5])
def test_inclusions_are_binomial(rate: float) -> None:
    """Sizes of draws over records, and counts of a record over draws; two wrong rates are rejected."""
    sampler = PoissonSampler(N, rate, seed=1)
    found = draws(sampler, 2000)
    sizes = [sum(len(draw) == size for draw in found) for size in range(N + 1)]

    def binomial(q: float) -> list[float]:
        return [float(stats.binom.pmf(size, N, q)) for size in range(N + 1)]

    assert not rejects(sizes, binomial(rate))
    assert rejects(sizes, binomial(rate * 1.2))
    assert rejects(sizes, binomial(rate * 0.8))
    per_record = [sum(record in draw for draw in found) for record in range(N)]
    values = [float(stats.binom.cdf(count, 2000, rate)) for count in per_record]
    assert stats.kstest(values, "uniform").pvalue > 1e-4


def test_records_and_steps_are_independent() -> None:
    """Joint frequencies of (record, another record) and of (record, the same one k draws later)."""
    sampler, rate = PoissonSampler(N, 0.3, seed=2), 0.3
    table = torch.zeros(3000, N)
    for number, draw in enumerate(draws(sampler, 3000)):
        table[number, draw] = 1
    centered = (table - rate) / math.sqrt(rate * (1 - rate))
    between_records = centered.T @ centered / 3000
    upper = between_records[torch.triu(torch.ones(N, N), 1).bool()] * math.sqrt(3000)
    assert stats.kstest(upper.numpy(), "norm").pvalue > 1e-4
    for lag in (1, 2, 7):
        product = (centered[lag:] * centered[:-lag]).mean(0) * math.sqrt(3000 - lag)
        assert stats.kstest(product.numpy(), "norm").pvalue > 1e-4
    broken = (centered[1:] * centered[1:]).mean(0) * math.sqrt(2999)
    assert stats.kstest(broken.numpy(), "norm").pvalue < 1e-4


def test_truncation_takes_a_uniform_subset() -> None:
    whole, cut = PoissonSampler(N, 0.3, seed=3), PoissonSampler(N, 0.3, seed=3, truncated_batch_size=8)
    kept = torch.zeros(N)
    possible = torch.zeros(N)
    for number in range(2000):
        everyone, some = whole.draw(number).tolist(), cut.draw(number).tolist()
        assert len(some) == min(len(everyone), 8)
        assert some == sorted(set(some) & set(everyone))
        if len(everyone) > 8:
            kept[some] += 1
            possible[everyone] += 8 / len(everyone)
    assert stats.chi2.sf(float(((kept - possible) ** 2 / possible).sum()), N) > 1e-4
    assert cut.sampling == Sampling("truncated_poisson", 0.3, N, 8)


def test_every_record_at_rate_one_and_large_data_sets() -> None:
    assert PoissonSampler(5, 1.0, seed=0).draw(3).tolist() == [0, 1, 2, 3, 4]
    large, second_chunk = PoissonSampler(2**20 + 1000, 0.03, seed=0), 0
    for number in range(10):
        drawn = large.draw(number)
        assert drawn.max() < 2**20 + 1000
        second_chunk += int((drawn >= 2**20).sum())
    assert abs(second_chunk - 300) < 5 * math.sqrt(300)


def test_keys() -> None:
    """With a seed draws repeat; without, nothing repeats, and neither state nor stream names the key."""
    assert draws(PoissonSampler(N, 0.3, seed=5), 5) == draws(PoissonSampler(N, 0.3, seed=5), 5)
    assert draws(PoissonSampler(N, 0.3, seed=5), 5) != draws(PoissonSampler(N, 0.3, seed=6), 5)
    one, other = PoissonSampler(N, 0.3), PoissonSampler(N, 0.3)
    assert draws(one, 5) != draws(other, 5)
    assert one.stream != other.stream
    assert set(one.state_dict()) == {"position", "stream", "dataset_size", "sample_rate", "truncated_batch_size"}
    assert one._key.hex() not in str(one.state_dict())


def test_the_sampler_is_a_batch_sampler() -> None:
    sampler = PoissonSampler(N, 0.2, steps=6, seed=1)
    loader = DataLoader(list(range(N)), batch_sampler=sampler, collate_fn=list)
    assert len(loader) == 6
    assert list(loader) == draws(sampler, 6)
    resumed = PoissonSampler(N, 0.2, steps=6, seed=1)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == draws(sampler, 6, first=6)
    with pytest.raises(OptionsError, match=r"sample_rate: 0\.2 in the state, 0\.3 here"):
        PoissonSampler(N, 0.3).load_state_dict(sampler.state_dict())


Pair = namedtuple("Pair", "x y")


class Records:
    """Record i holds the number i in the form that is asked for."""

    def __init__(self, form: str, items: bool = False) -> None:
        self.form = form
        if items:
            self.__getitems__ = lambda indices: [self[index] for index in indices]

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        assert 0 <= index < N
        x, y = torch.full((2,), float(index)), index
        return {"dict": {"x": x, "y": y}, "tuple": (x, y), "named": Pair(x, y), "tensor": x, "object": object()}[self.form]


def loader_over(source: Any, **changes: Any) -> PrivateDataLoader:
    arguments = {"sample_rate": 0.12, "physical_batch_size": 5, "steps": 20, "seed": 4, **changes}
    return private_dataloader(source, PrivacyState(), **arguments)


def delivered(loader: PrivateDataLoader) -> list[list[int]]:
    """Logical batches, put together from what the masks let through."""
    logical: list[list[int]] = [[]]
    for x, y, mask in loader:
        assert len(x) == len(y) == len(mask) == loader.physical_batch_size
        assert not x[mask == 0].any()
        logical[-1] += y[mask == 1].tolist()
        if loader.batch_complete:
            logical.append([])
    assert logical.pop() == []
    return logical


@pytest.mark.parametrize("changes", [{}, {"num_workers": 2, "prefetch_factor": 3}])
@pytest.mark.parametrize("items", [False, True])
def test_physical_batches_hold_the_draw(changes: dict[str, Any], items: bool) -> None:
    loader = loader_over(Records("tuple", items=items and not changes), **changes)
    found = delivered(loader)
    assert found == draws(loader.sampler, 20)
    assert {len(draw) > 5 for draw in found} == {True, False}


def test_empty_draws_are_delivered() -> None:
    loader = loader_over(Records("tuple"), sample_rate=0.01, steps=30)
    found = delivered(loader)
    assert found == draws(loader.sampler, 30)
    assert [] in found


def test_forms_of_batches() -> None:
    for batch in loader_over(Records("dict")):
        assert set(batch) == {"x", "y", "sample_mask"}
        assert (batch["y"][batch["sample_mask"] == 0] == 0).all()
    (batch,) = list(loader_over(Records("dict"), steps=1, sample_rate=0.01, mask_name="keep"))
    assert set(batch) == {"x", "y", "keep"}
    for named, mask in loader_over(Records("named")):
        assert torch.equal(named.x[:, 0], named.y.float())
        assert mask.shape == (5,)
    for x, mask in loader_over(Records("tensor")):
        assert (x.shape, mask.dtype) == ((5, 2), torch.float32)


def test_custom_collate_comes_from_the_loader() -> None:
    def collate(samples: list[Any]) -> dict[str, Tensor]:
        return {"total": torch.stack([x + y for x, y in samples])}

    source = DataLoader(Records("tuple"), batch_size=4, collate_fn=collate)
    loader = loader_over(source, sample_rate=None, physical_batch_size=None)
    assert (loader.physical_batch_size, loader.expected_batch_size) == (4, 4.0)
    for batch in loader:
        assert batch["total"].shape == (4, 2)


def test_padding_sample_without_mask() -> None:
    loader = loader_over(Records("tuple"), padding_sample=(torch.zeros(2), -100), mask_name=None)
    found = [label for _, y in loader for label in y.tolist() if label != -100]
    assert found == [record for draw in draws(loader.sampler, 20) for record in draw]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (Stream(), {}, r"needs a map-style data set.*got Stream"),
        (Records("tuple"), {"expected_batch_size": 4}, r"sample_rate=0\.12 and expected_batch_size=4: set one"),
        (Records("tuple"), {"physical_batch_size": None}, r"physical_batch_size is missing"),
        (Records("tuple"), {"physical_batch_size": 0}, r"physical_batch_size must be an integer >= 1; got 0"),
        (Records("tuple"), {"sample_rate": 1.1}, r"sample_rate must be a probability"),
        (Records("tuple"), {"sample_rate": math.nan}, r"sample_rate must be a finite number > 0; got nan"),
        (Records("tuple"), {"sample_rate": None, "expected_batch_size": "8"}, r"expected_batch_size must be a finite number > 0"),
        ([], {"sample_rate": None, "expected_batch_size": 8}, r"the number of records must be an integer >= 1; got 0"),
        (DataLoader(Records("tuple"), 4), {"physical_batch_size": 0}, r"physical_batch_size must be an integer >= 1; got 0"),
        (Records("tuple"), {"mask_name": None}, r"no mask to cancel the padding"),
        (Records("tuple"), {"shuffle": True}, r"shuffle: the private loader decides this"),
        (Records("tuple"), {"rank": 0, "world_size": 2, "seed": None}, r"All ranks must split the same draws"),
        (Records("tuple"), {"rank": 2, "world_size": 2}, r"rank=2 and world_size=2"),
        (Records("tuple"), {"lookahead": 1}, r"lookahead=1 with draws of several physical batches"),
    ],
)
def test_wrong_arguments_are_refused(source: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        loader_over(source, **changes)


def test_samples_that_cannot_be_blank_are_refused() -> None:
    with pytest.raises(OptionsError, match="holds a object, and nothing says what an empty one is"):
        list(loader_over(Records("object"), collate_fn=list))


def test_a_key_of_the_same_name_is_refused() -> None:
    with pytest.raises(OptionsError, match="already have a key 'x'"):
        list(loader_over(Records("dict"), mask_name="x"))


def test_ranks_split_one_draw() -> None:
    loaders = [loader_over(Records("tuple"), rank=rank, world_size=3) for rank in range(3)]
    parts = [[len(loader_parts) for loader_parts in _parts(loader)] for loader in loaders]
    assert parts[0] == parts[1] == parts[2]  # collectives match
    shares = [delivered(loader) for loader in loaders]
    for number, expected in enumerate(draws(loaders[0].sampler, 20)):
        assert sorted(record for share in shares for record in share[number]) == expected
    assert len({loader.sampler.stream for loader in loaders}) == 1
    # Whether a record is drawn does not depend on which rank it went to: shares differ by one at most.
    assert all(max(map(len, step)) - min(map(len, step)) <= 1 for step in zip(*shares, strict=True))


def _drawing_rank(rank: int, rendezvous: str, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    loader = loader_over(Records("tuple"), seed=None)
    results.put((rank, loader.sampler.stream, delivered(loader), draws(loader.sampler, 20)))
    torch.distributed.destroy_process_group()


def test_ranks_share_a_key_of_the_operating_system(tmp_path: Path) -> None:
    """Two real processes: rank and key come from torch.distributed, and nobody was given a seed."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_drawing_rank, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for process in ranks:
        process.start()
    first, second = sorted(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join()
    assert first[1] == second[1]
    assert first[3] == second[3]
    assert [sorted(one + other) for one, other in zip(first[2], second[2], strict=True)] == first[3]


def _parts(loader: PrivateDataLoader) -> list[list[Any]]:
    return [list(loader._parts_of(number)) for number in range(20)]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_goes_on_where_it_stopped(workers: int) -> None:
    loader, resumed = (loader_over(Records("tuple"), num_workers=workers) for _ in range(2))
    count = 0
    for _ in loader:
        count += loader.batch_complete
        if count == 7:
            saved = copy.deepcopy(loader.state_dict())
            break
    resumed.load_state_dict(saved)
    assert delivered(resumed) == draws(loader.sampler, 13, first=7)
    assert delivered(resumed) == draws(loader.sampler, 20, first=20)  # a new iteration goes on with fresh draws


def test_length_is_known_only_where_it_is_fixed() -> None:
    assert len(loader_over(Records("tuple"), truncated_batch_size=5)) == 20
    assert len(loader_over(Records("tuple"), physical_batch_size="variable")) == 20
    with pytest.raises(TypeError, match=r"truncated_batch_size <= physical_batch_size \* world_size"):
        len(loader_over(Records("tuple")))


# With the real backend.


def records(size: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def private_loss(model: nn.Module, backend: str, **changes: Any) -> Any:
    options = {"max_grad_norm": 0.7, "noise_multiplier": 0.0, **changes}

    def loss(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        losses = F.cross_entropy(model(x), y, reduction="none") * mask
        return losses.sum() if options.get("loss_reduction") == "sum" else losses.mean()

    return torch.compile(loss, backend=backend, options=options)


def expected_gradients(model: nn.Module, data: TensorDataset, drawn: list[int], length: float, **options: Any) -> Any:
    x, y = data.tensors[0].double(), data.tensors[1]
    samples = per_sample_gradients(double_copy(model), lambda twin, b: F.cross_entropy(twin(x[b : b + 1]), y[b : b + 1]), len(data))
    chosen = {"max_grad_norm": 0.7, "loss_reduction": "sum", **options}
    clipped = clip([samples[record] for record in drawn], chosen)
    if not drawn:
        return {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    return {name: value / length for name, value in clipped.sums.items()}


CLIPPINGS: list[dict[str, Any]] = [
    {"clipping": "flat"},
    {"clipping": "automatic"},
    {"clipping": "per_layer"},
    {"clipping": "group", "groups": {"0.*": 0.56, "*": 0.42}},
]


@pytest.mark.parametrize("options", CLIPPINGS, ids=lambda options: options["clipping"])
def test_masked_samples_contribute_exactly_zero(options: dict[str, Any], backend: str) -> None:
    """Gradients of a batch with padding equal, bit by bit, those with other padding, and are zero if all is padding."""
    model = network()
    loss = private_loss(model, backend, loss_reduction="sum", **options)
    x, y = (tensor[:6] for tensor in records().tensors)
    mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    found = []
    for padding in (0.0, 3.0, 1e4):
        filled = x.clone()
        filled[4:] = padding
        loss(filled, y, mask).backward()
        found.append(gradients_of(model))
        model.zero_grad()
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)
    assert any(value.any() for value in found[0].values())
    loss(x, y, torch.zeros(6)).backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", CLIPPINGS, ids=lambda options: options["clipping"])
def test_padded_and_variable_batches_give_the_oracles_sums(options: dict[str, Any], backend: str) -> None:
    data, drawn = records(), None
    for size in (4, "variable"):
        torch._dynamo.reset()
        model = network()
        loss, state = private_loss(model, backend, **options), privacy(model)
        loader = private_dataloader(data, state, sample_rate=0.12, physical_batch_size=size, steps=4, seed=11)
        drawn, number = draws(loader.sampler, 4), 0
        for x, y, mask in loader:
            loss(x, y, mask).backward()
            if loader.batch_complete:
                want = expected_gradients(model, data, drawn[number], loader.expected_batch_size, **options)
                assert_agree(gradients_of(model), want)
                model.zero_grad()
                number += 1
        assert number == 4
    assert drawn is not None
    assert {len(one) > 4 for one in drawn} == {True, False}


def seed_with_sizes(rate: float, steps: int, sizes: set[int]) -> int:
    """A seed whose draws need each of these numbers of physical batches of 4."""
    for seed in range(1000):
        found = {-(-len(draw) // 4) for draw in draws(PoissonSampler(N, rate, seed=seed), steps)}
        if found == sizes:
            return seed
    raise AssertionError("no such seed")


@pytest.mark.parametrize("size", [4, "variable"])
def test_a_poisson_run_compiles_once(size: Any, backend: str) -> None:
    """Logical batches of 0 to 3 times the physical size; every one, the empty ones too, releases noise once."""
    seed = seed_with_sizes(0.12, 25, {0, 1, 2, 3})
    model = network()
    loss, state = private_loss(model, backend, noise_multiplier=1.0, loss_reduction="sum"), privacy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = private_dataloader(records(), state, sample_rate=0.12, physical_batch_size=size, steps=25, seed=seed)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x, y, mask in loader:
            loss(x, y, mask).backward()
            if loader.batch_complete:
                assert all(p.grad is not None and p.grad.any() for p in model.parameters())
                optimizer.step()
                optimizer.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert state.steps == 25
    assert state.account.history.mechanisms() == {Mechanism(1.0, Sampling("poisson", 0.12, N)): 25}


# How the loader drives the account, with the stand-in for a compiled graph.


def small(noise: float = 1.0) -> tuple[nn.Module, Private, PrivacyState]:
    model = nn.ParameterList(weights(1))
    return model, Private(*model, noise_multiplier=noise), privacy(model)


def small_loader(state: PrivacyState, **changes: Any) -> PrivateDataLoader:
    arguments = {"sample_rate": 0.2, "physical_batch_size": 3, "steps": 10, "seed": 1, **changes}
    return private_dataloader(list(torch.randn(N, 3)), state, **arguments)


def test_a_step_before_the_draw_is_complete_is_refused() -> None:
    model, graph, state = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = small_loader(state)
    for x, mask in loader:
        graph(x * mask[:, None]).backward()
        if not loader.batch_complete:
            with pytest.raises(UnprotectedGradientError, match="the last backward pass added no noise"):
                optimizer.step()
            break


def test_skipped_draws_cost_nothing_and_leave_nothing_behind() -> None:
    """A draw that is given up half way, with zero_grad(), does not make the next one dearer."""
    model, graph, state = small()
    loader = small_loader(state)
    skipped = 0
    for x, mask in loader:
        number = loader.sampler.position if not loader.batch_complete else loader.sampler.position - 1
        if number % 2 and loader.batch_complete:
            model.zero_grad()
            skipped += 1
            continue
        graph(x * mask[:, None]).backward()
        if loader.batch_complete:
            model.zero_grad()
    assert skipped == 5
    assert state.account.history.mechanisms() == {Mechanism(1.0, Sampling("poisson", 0.2, N)): 5}


def test_sums_kept_over_a_skipped_draw_are_not_credited() -> None:
    """Without zero_grad() the next release holds two draws."""
    model, graph, state = small()
    loader = small_loader(state, steps=2, seed=seed_for_two_parts())
    for x, mask in loader:
        if loader.sampler.position == 1 and loader.batch_complete:
            continue
        graph(x * mask[:, None]).backward()
    assert state.account.history.mechanisms() == {Mechanism(0.5): 1}
    assert next(model.parameters()).grad is not None


def seed_for_two_parts() -> int:
    """A seed for which the first draw needs several physical batches of 3."""
    return next(seed for seed in range(100) if len(PoissonSampler(N, 0.2, seed=seed).draw(0)) > 3)


def test_two_passes_over_a_batch_cost_more() -> None:
    _model, graph, state = small()
    for x, mask in small_loader(state, truncated_batch_size=3):
        graph(x * mask[:, None]).backward()
        graph(x * mask[:, None]).backward()
    assert state.steps == 20
    (mechanism,) = state.account.history.mechanisms()
    assert mechanism.noise_multiplier == pytest.approx(0.5**0.5)
    assert mechanism.sampling == Sampling("truncated_poisson", 0.2, N, 3)


def test_batches_from_elsewhere_are_not_credited() -> None:
    _model, graph, state = small()
    for x, mask in small_loader(state, truncated_batch_size=3):
        graph(x * mask[:, None]).backward()
    graph(torch.randn(3, 3)).backward()
    assert state.account.history.mechanisms()[Mechanism(1.0)] == 1


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_loop_that_fetches_ahead_says_so(lookahead: int) -> None:
    """Not saying so costs credit, never the other way round."""
    _model, graph, state = small()
    held: list[Any] = []
    loader = small_loader(state, truncated_batch_size=3, lookahead=lookahead)
    assert len(loader) == 10
    for x, mask in loader:
        held.append(x * mask[:, None])
        if len(held) > 1:
            graph(held.pop(0)).backward()
    graph(held.pop(0)).backward()
    counts = state.account.history.mechanisms()
    credited = Mechanism(1.0, Sampling("truncated_poisson", 0.2, N, 3))
    assert counts == ({credited: 10} if lookahead else {credited: 9, Mechanism(1.0): 1})
    graph(torch.randn(3, 3)).backward()
    assert state.account.history.mechanisms()[Mechanism(1.0)] == 2 - lookahead
