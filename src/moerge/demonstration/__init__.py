"""`moerge demo`: small experts trained on the spot, merged in six ways, compared."""

from moerge.demonstration.flow import run
from moerge.demonstration.result import DemoResult

__all__ = ["DemoResult", "run"]
