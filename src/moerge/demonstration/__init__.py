"""`moerge demo`: small experts trained on the spot, merged in six ways, compared."""

from moerge.demonstration.flow import demo
from moerge.demonstration.result import DemoResult

__all__ = ["DemoResult", "demo"]
