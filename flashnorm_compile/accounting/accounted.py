"""The side of a privacy state that a person asks: what was spent, and where it is recorded."""

from __future__ import annotations

import os

from .account import Account
from .accountant import AccountantName, Relation, epsilon_of
from .statement import Spent, spent


class Accounted:
    """Has an account of noised releases."""

    def __init__(self) -> None:
        self.account = Account()

    @property
    def steps(self) -> int:
        """Noised releases so far, several graphs in one backward pass together as one; with a ledger, all that it holds."""
        return self.account.history.releases

    def epsilon(self, delta: float, *, accountant: AccountantName = "pld", relation: Relation = "add_or_remove_one") -> float:
        """Epsilon spent so far at ``delta``; infinite if a release had no noise.

        Sampling is credited for releases on batches of ``private_dataloader`` only. ``accountant`` is "pld" (tight) or
        "rdp", ``relation`` "add_or_remove_one" or "replace_one" record.

        Raises:
            ImportError: dp-accounting is not installed.
            OptionsError: an argument is out of range, or the accountant cannot compute this.
        """
        return epsilon_of(self.account.history.mechanisms(), delta, accountant, relation)

    def spent(
        self,
        *deltas: float,
        sample_rate: float | None = None,
        accountant: AccountantName = "pld",
        relation: Relation = "add_or_remove_one",
    ) -> Spent:
        """What was spent, for a report: ``print(privacy(model).spent(1e-5))``. Without a delta, at 1e-5, 1e-6 and 1e-7.

        ``sample_rate`` claims that batches which ``private_dataloader`` did not draw were Poisson draws at that rate; the
        figure with that amplification is then given beside the one without. Raises as ``epsilon``.
        """
        clipping, notes = self.spending_notes()
        return spent(
            self.account.history,
            *(deltas or (1e-5, 1e-6, 1e-7)),
            sample_rate=sample_rate,
            accountant=accountant,
            relation=relation,
            clipping=clipping,
            notes=tuple(notes),
        )

    def record_to(self, path: str | os.PathLike[str]) -> None:
        """Keeps a ledger: each noised release is on the disk at ``path`` before its gradients can be used.

        An existing ledger is continued, and what it holds counts as spent, so that a crash loses no release; a new one
        takes over what this state has counted. With several ranks only rank 0 calls this.

        Raises:
            PrivacyError: the file is no ledger, another writer uses it, or it holds fewer releases than this state.
        """
        self.account.record_to(path)

    def spending_notes(self) -> tuple[str, list[str]]:
        """How records are clipped, and what the figures do not cover, one sentence each."""
        raise NotImplementedError
