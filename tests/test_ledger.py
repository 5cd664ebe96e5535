"""The ledger holds every release that an optimizer applied, after any crash, and can be opened again."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked
import ledger_child
import pytest
import torch
from flashnorm_compile.passes.errors import OptionsError, PrivacyError
from stand_in import Private, weights
from torch import nn

from flashnorm_compile import privacy, read_ledger
from flashnorm_compile.accounting import History, Ledger, Mechanism, Release, Sampling
from flashnorm_compile.state import PrivacyState

X = torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]])
POISSON = Sampling("poisson", 0.01, 1000)
ONE = Release(Mechanism(1.0, POISSON), ("5f0c", 0), 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def trained(path: Path | None, steps: int = 3) -> tuple[nn.Module, Private, PrivacyState]:
    model = nn.ParameterList(weights(1))
    graph, state = Private(*model, noise_multiplier=2.0), privacy(model)
    if path is not None:
        state.record_to(path)
    for _ in range(steps):
        graph(X).backward()
    return model, graph, state


def test_one_line_for_each_release(path: Path) -> None:
    _model, graph, state = trained(path)
    with state.accumulate():
        graph(X).backward()
    assert len(path.read_text().splitlines()) == 4  # no noise, no line
    state.noise_multiplier = 0.5
    graph(X).backward()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines[1:]] == [1, 2, 3, 4]
    assert [line["noise_multiplier"] for line in lines[1:]] == [2.0, 2.0, 2.0, 0.5]
    assert lines[4]["micro_batches"] == 2
    assert (lines[1]["sampler"], lines[1]["sample_rate"]) == (None, None)
    assert len({line["run"] for line in lines[1:]}) == 1
    assert read_ledger(path).to_plain() == state.account.history.to_plain()
    assert read_ledger(path).mechanisms() == {Mechanism(2.0): 3, Mechanism(0.5): 1}


def test_draws_are_written_and_read(path: Path) -> None:
    truncated = Sampling("truncated_poisson", 0.1, 1000, 120)
    ledger = Ledger(path)
    for release in (ONE, ONE, Release(Mechanism(1.5, truncated), ("77aa", 12))):
        ledger.append(release)
    history = read_ledger(path)
    assert history.releases == 3
    assert history.micro_batches == 5
    assert history.mechanisms() == {Mechanism(0.5**0.5, POISSON): 1, Mechanism(1.5, truncated): 1}


def test_the_line_is_on_the_disk_before_backward_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written, then synced, and only then does the release know how much noise to draw."""
    model = nn.ParameterList(weights(1))
    graph, state = Private(*model, noise_multiplier=2.0), privacy(model)
    state.record_to(path)
    events: list[str] = []
    write, sync, keys = os.write, os.fsync, PrivacyState.noise_keys

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            events.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "write", noted("write", write))
    monkeypatch.setattr(os, "fsync", noted("sync", sync))
    monkeypatch.setattr(PrivacyState, "noise_keys", noted("noise", keys))
    graph(X).backward()
    assert events == ["write", "sync", "noise"]


def test_nothing_is_released_when_the_disk_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, _state = trained(path, steps=0)

    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        graph(X).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_short_writes_are_completed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    Ledger(path).append(ONE)
    monkeypatch.undo()
    assert read_ledger(path).to_plain() | {"unreadable": 0} == read_ledger(path).to_plain()
    assert read_ledger(path).releases == 1


def test_every_cut_of_the_last_line_counts_and_reopens(path: Path) -> None:
    ledger = Ledger(path)
    for draw in range(3):
        ledger.append(Release(Mechanism(1.0, POISSON), ("5f0c", draw)))
    ledger.close()
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        history = read_ledger(path)
        assert history.releases == (2 if end == start else 3), whole[start:end]
        assert set(history.mechanisms()) == {Mechanism(1.0, POISSON)}
        again = Ledger(path)
        again.append(Release(Mechanism(1.0, POISSON), ("5f0c", 3)))
        again.close()
        assert read_ledger(path).releases == history.releases + 1
        assert read_ledger(path).unreadable == history.unreadable <= 1


@pytest.mark.parametrize("damage", [b"\0" * 80, b'{"step": 1, "noise_multiplier": NaN}', b"[1]", b"7"])
def test_damaged_lines_count_as_their_neighbors(path: Path, damage: bytes) -> None:
    ledger = Ledger(path)
    ledger.close()
    with path.open("ab") as file:
        file.write(damage)
    assert read_ledger(path).mechanisms() == {Mechanism(0.0): 1}  # nothing known: no privacy
    ledger = Ledger(path)
    ledger.append(ONE)
    ledger.close()
    history = read_ledger(path)
    assert (history.releases, history.unreadable) == (2, 1)
    assert set(history.mechanisms()) == {Mechanism(1.0, POISSON)}


def test_a_crash_between_checkpoint_and_ledger_loses_nothing(path: Path) -> None:
    """The checkpoint is of step 2, the process died after step 5: five steps were spent."""
    _model, graph, state = trained(path, steps=2)
    checkpoint = state.state_dict()
    for _ in range(3):
        graph(X).backward()
    state.account.close()
    for ledger_first in (True, False):
        _model, _graph, resumed = trained(None, steps=0)
        if ledger_first:
            resumed.record_to(path)
        resumed.load_state_dict(checkpoint)
        resumed.record_to(path)
        assert resumed.steps == 5
        resumed.account.close()


def test_a_new_ledger_takes_over_what_was_counted(path: Path) -> None:
    _model, graph, state = trained(None, steps=4)
    state.record_to(path)
    graph(X).backward()
    assert state.steps == read_ledger(path).releases == 5
    assert read_ledger(path).mechanisms() == {Mechanism(2.0): 5}


def test_the_ledger_of_another_training_is_refused(path: Path) -> None:
    Ledger(path).close()
    _model, _graph, state = trained(None, steps=4)
    with pytest.raises(PrivacyError, match=r"holds 0 releases, fewer than the 4 that this training has made"):
        state.record_to(path)
    _model, _graph, fresh = trained(path, steps=1)
    with pytest.raises(PrivacyError, match=r"checkpoint counts 4 releases, the ledger .* only 1"):
        fresh.load_state_dict(state.state_dict())


def test_wrong_files_are_refused_untouched(path: Path) -> None:
    path.write_text("my notes\n")
    with pytest.raises(PrivacyError, match=r"not a privacy ledger of format 1: its first line is b'my notes'"):
        Ledger(path)
    assert path.read_text() == "my notes\n"
    with pytest.raises(OptionsError, match=r"the folder .* does not exist"):
        Ledger(path.parent / "nowhere" / "ledger.jsonl")


def test_one_writer_at_a_time(path: Path) -> None:
    ledger = Ledger(path)
    with pytest.raises(PrivacyError, match="open for writing elsewhere"):
        Ledger(path)
    ledger.close()
    Ledger(path).close()


def test_a_forked_process_neither_writes_nor_holds_the_lock(path: Path) -> None:
    """Workers of a data loader are forked from a process with an open ledger."""
    ledger = Ledger(path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ledger.append(ONE)
            os.write(write, b"wrote")
        except PrivacyError as error:
            os.write(write, str(error).encode())
        signal.pause()
    try:
        assert b"belongs to the parent process" in os.read(read, 1000)
        ledger.close()
        Ledger(path).close()  # while the child lives
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert read_ledger(path).releases == 0


def test_creation_is_all_or_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", die)
    with pytest.raises(KeyboardInterrupt):
        Ledger(path, carried=History())
    assert list(path.parent.iterdir()) == []


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait_for(applied: Path, size: int, process: BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while size_of(applied) < size:
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.001)


@contextmanager
def killed_at_the_end(process: BaseProcess) -> Iterator[BaseProcess]:
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_kill_at_random_points(path: Path) -> None:
    """One training that is killed 50 times and resumed from its ledger alone."""
    applied, generator = path.with_name("applied"), random.Random(7)
    for attempt in range(50):
        before = size_of(applied)
        with killed_at_the_end(forked.start(ledger_child.train, ledger_child.stand_in, path, applied)) as process:
            if attempt % 5:  # else it may die before its first step, or while it makes the ledger
                wait_for(applied, before + 1, process)
            time.sleep(generator.uniform(0.0, 0.03))
        if not path.exists():
            assert size_of(applied) == 0
            continue
        history = read_ledger(path)
        assert history.releases >= size_of(applied)
        # Of each life at most one release was recorded that was not applied: the ledger is not simply full.
        assert history.releases <= size_of(applied) + attempt + 1
        Ledger(path).close()
        assert read_ledger(path).to_plain() == history.to_plain()
    assert size_of(applied) > 40


def test_kill_with_a_compiled_model(path: Path) -> None:
    applied, generator = path.with_name("applied"), random.Random(8)
    for attempt in range(2):
        before = size_of(applied)
        with killed_at_the_end(forked.start(ledger_child.train, ledger_child.compiled, path, applied)) as process:
            wait_for(applied, before + 3, process)
            time.sleep(generator.uniform(0.0, 0.03))
        assert size_of(applied) <= read_ledger(path).releases <= size_of(applied) + attempt + 1
