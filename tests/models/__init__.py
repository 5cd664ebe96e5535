"""The zoo: small models with random weights, which every capture, rule and rewrite has to get right."""

from models import algebra, language, sequence, vision
from models.case import Case

ZOO: dict[str, Case] = {case.name: case for family in (algebra, sequence, vision, language) for case in family.CASES}

__all__ = ["ZOO", "Case"]
