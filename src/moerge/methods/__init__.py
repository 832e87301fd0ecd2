"""Dense merge methods: formulas on blocks of float32, nothing about files."""

from moerge.methods.function import method
from moerge.methods.method import Block, MergeMethod, Statistic, TaskVectorMethod, merge_method, merge_methods

__all__ = ["Block", "MergeMethod", "Statistic", "TaskVectorMethod", "merge_method", "merge_methods", "method"]
