"""Soundness: not speed but truth. What each contender does where a careless method releases too much, or trains too little.

`run(contenders, device)` measures; see `judge` for how, `traps` for what, `verdict` for rows, files and the table.
"""

from benchmarks.soundness.judge import judge, run
from benchmarks.soundness.traps import TRAPS, Trap
from benchmarks.soundness.verdict import SoundnessRow, markdown_table, read, write

__all__ = ["TRAPS", "SoundnessRow", "Trap", "judge", "markdown_table", "read", "run", "write"]
