"""All cases of the zoo by name; not in the package's ``__init__``, which would import transformers for every test."""

from __future__ import annotations

from models import algebra, language, sequence, vision
from models.case import Case

ZOO: dict[str, Case] = {case.name: case for family in (algebra, sequence, vision, language) for case in family.CASES}
