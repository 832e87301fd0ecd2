"""`moerge demo`: small experts trained on the spot, merged in six ways, compared."""

from moerge.demo.flow import run
from moerge.demo.result import DemoResult

__all__ = ["DemoResult", "run"]
