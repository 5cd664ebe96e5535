"""The ledger: a file with one line of JSON for each noised release, on the disk before anybody can use the release.

    line 1      {"ledger": "flashnorm_compile", "format": 1, "carried": {...}}     what was released before the file
    other lines {"step": 1, "noise_multiplier": 1.1, "sampler": "poisson", "sample_rate": 0.01, "dataset_size": 60000,
                 "draw": ["5f0c...", 0], "micro_batches": 2, "run": "a31b..."}

The file is created whole or not at all (written under another name, synced, linked). A line is appended with one write
and synced before ``append`` returns. A process that dies in between leaves at most one line that nothing was released
for; a line that cannot be read counts as a release like the one before it, so that a ledger never holds fewer releases
than were used. Lines are never changed or removed. One process writes at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import weakref
from pathlib import Path
from typing import Any

from ..passes.errors import OptionsError, PrivacyError
from .mechanism import History, Mechanism, Release, mechanism_from_plain, mechanism_to_plain

_NAME, _FORMAT = "flashnorm_compile", 1
_open_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


class Ledger:
    """An open ledger file, locked against other writers until ``close`` or the end of the process.

    Raises:
        PrivacyError: the file is no ledger, or another writer has it open.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], carried: History | None = None) -> None:
        """Opens ``path``, or creates it with ``carried`` as what was released before."""
        self.path = Path(path)
        self.run = os.urandom(8).hex()
        _create(self.path, carried or History())
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            self._lock()
            self.history = read_ledger(self.path)
            self._end_torn_line()
        except BaseException:
            self.close()
            raise
        _open_ledgers.add(self)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrivacyError(
                f"The ledger {self.path} is open for writing elsewhere, in this process or another one. One training "
                "writes one ledger: end the other one, or give this one a path of its own. With several ranks, only "
                "rank 0 calls record_to."
            ) from None

    def _end_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        if os.pread(self._file, 1, size - 1) != b"\n":
            _write(self._file, b"\n")

    def append(self, release: Release) -> None:
        """Counts a release, on the disk when this returns. A failure raises, and then nothing must be released."""
        if self._file < 0:
            raise PrivacyError(
                f"The ledger {self.path} is closed, or was opened before a fork and belongs to the parent process. "
                "Call privacy(model).record_to(path) in the process that trains."
            )
        line: dict[str, Any] = {"step": self.history.releases + 1, **mechanism_to_plain(release.mechanism)}
        if release.draw is not None:
            line["draw"] = list(release.draw)
        line |= {"micro_batches": release.micro_batches, "run": self.run}
        _write(self._file, json.dumps(line).encode() + b"\n")
        self.history.add(release)

    def close(self) -> None:
        """Gives the file free. The ledger can be opened again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()


def read_ledger(path: str | os.PathLike[str]) -> History:
    """The releases in the ledger at ``path``, in compact form. Works while a training writes to it.

    Raises:
        PrivacyError: the file is no ledger.
        OSError: it cannot be read.
    """
    lines = Path(path).read_bytes().split(b"\n")
    history = _read_head(path, lines[0])
    previous = history.spans[-1].mechanism if history.spans else None
    leading = 0  # unreadable lines before the first readable one
    for line in lines[1:]:
        if not line:
            continue
        release = _read_line(line)
        if release is None:
            history.unreadable += 1
            leading += previous is None
            if previous is not None:
                history.add(Release(previous))
            continue
        previous = release.mechanism
        for _ in range(leading):
            history.add(Release(previous))
        leading = 0
        history.add(release)
    for _ in range(leading):
        history.add(Release(Mechanism(0.0)))  # nothing tells how much noise it had
    return history


def _read_head(path: str | os.PathLike[str], line: bytes) -> History:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        head = json.loads(line)
        if head["ledger"] == _NAME and head["format"] == _FORMAT:
            return History.from_plain(head["carried"])
    raise PrivacyError(
        f"{os.fspath(path)} is not a privacy ledger of format {_FORMAT}: its first line is {line[:60]!r}. Nothing was "
        "written to it. Give record_to a path that does not exist yet, or a ledger that record_to has made."
    )


def _read_line(line: bytes) -> Release | None:
    """The release on a line; None if the line was cut short or damaged."""
    try:
        plain = json.loads(line)
        draw = plain.get("draw")
        return Release(
            mechanism_from_plain(plain),
            None if draw is None else (str(draw[0]), int(draw[1])),
            int(plain["micro_batches"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _create(path: Path, carried: History) -> None:
    """Makes the file with its first line, unless it exists. Nobody ever sees a part of it."""
    if path.exists():
        return
    if not path.parent.is_dir():
        raise OptionsError(f"record_to({os.fspath(path)!r}): the folder {path.parent} does not exist. Make it first.")
    head = {"ledger": _NAME, "format": _FORMAT, "carried": carried.to_plain()}
    draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _write(file, json.dumps(head).encode() + b"\n")
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(draft, path)
    finally:
        os.close(file)
        os.unlink(draft)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
    os.fsync(file)


def _forget_in_child() -> None:
    """A forked process must neither write to the parent's ledgers nor keep their locks alive."""
    for ledger in list(_open_ledgers):
        ledger.close()


os.register_at_fork(after_in_child=_forget_in_child)
