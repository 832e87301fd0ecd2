"""How good checkpoints are: the MergeME paper's six benchmarks, and perplexity of held-out text, with their errors."""

from moerge.evaluation.benchmarks import BENCHMARKS
from moerge.evaluation.result import Difference, Evaluation, Score
from moerge.evaluation.run import Settings, evaluate

__all__ = ["BENCHMARKS", "Difference", "Evaluation", "Score", "Settings", "evaluate"]
