"""How much memory a cache takes: what `momentkv plan` prints, from a model's shape alone."""

from momentkv.plan.memory import DTYPES, Plan, plan, plan_codes
from momentkv.plan.table import size, table_of, table_of_codes, table_of_known
from momentkv.shapes import KNOWN, Shape, find_shape, shape_from_config

__all__ = [
    "DTYPES",
    "KNOWN",
    "Plan",
    "Shape",
    "find_shape",
    "plan",
    "plan_codes",
    "shape_from_config",
    "size",
    "table_of",
    "table_of_codes",
    "table_of_known",
]
