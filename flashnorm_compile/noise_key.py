"""The secret that noise is made from: one for each privacy state, never stored, and never drawn from twice.

Noise is a function of (secret, release, parameter name, element): a release number and the secret give a generator key and a
stream, to which each parameter adds a constant of its name. Where a parameter lies, and on how many devices, does not enter.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

_token = os.urandom(32)


def _renew() -> None:
    global _token
    _token = os.urandom(32)


os.register_at_fork(after_in_child=_renew)


def _this_process() -> bytes:
    """Different in every process. Numbers of processes come again, after many others or in another container, so that a fork of
    Python's gets a token of its own; the number tells apart what is forked behind Python's back."""
    return _token + os.getpid().to_bytes(8, "little")


class NoiseKey:
    """256 bits from the operating system, bound to this process: a fork that inherits them draws other noise."""

    def __init__(self) -> None:
        self._secret = os.urandom(32)
        self._salt = b""
        self._repeatable = False
        self._owner: bytes | None = None

    def seed(self, text: str) -> None:
        """Makes the noise a function of ``text``, the same in every process. For tests."""
        self._secret = hashlib.blake2b(text.encode(), digest_size=32).digest()
        self._repeatable = True

    def refresh(self) -> None:
        """Everything drawn from now on is new, even with a seed: after a resume, release numbers come again."""
        self._salt = os.urandom(32)

    def share(self) -> bytes:
        """What another rank needs to draw the same noise."""
        return self._secret + self._salt

    def take(self, shared: bytes) -> None:
        """Draws what the rank draws that ``shared`` comes from: the secret is no longer bound to one process, but a fork of
        this one still draws other noise."""
        self._secret, self._salt = shared[:32], shared[32:]
        self._owner = _this_process()

    def words(self, release: int, streams: Tensor) -> Tensor:
        """int64 [P, 2]: generator key and stream of each parameter in the release of this number; ``streams``: int64 [P].

        They are made on the device of ``streams``: a copy from the host would make every step wait for the device.
        """
        mine = self._repeatable or self._owner == _this_process()
        process = b"" if mine else _this_process()
        digest = hashlib.shake_128(self._secret + self._salt + process + release.to_bytes(8, "little")).digest(16)
        key, stream = struct.unpack("<qq", digest)
        words = streams.new_empty((len(streams), 2))
        words[:, 0] = key
        torch.bitwise_xor(streams, stream, out=words[:, 1])
        return words


def streams_of(names: Sequence[str]) -> Tensor:
    """int64 [P]: a constant for each name, all different; a name that comes again counts as another one."""
    found: dict[int, None] = {}
    for name in names:
        again = 0
        while (stream := _hashed(f"{name}\0{again}")) in found:
            again += 1
        found[stream] = None
    return torch.tensor(list(found), dtype=torch.int64, device="cpu")


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
