"""Names for packages that add merge methods, families, MoE formats and routers. Import them from here: their homes may move."""

from moerge.architecture.family import Family, TensorRule
from moerge.architecture.moe_format import MoEFormat
from moerge.errors import InputError
from moerge.methods.function import method
from moerge.methods.method import Block, MergeMethod, Statistic, TaskVectorMethod
from moerge.methods.statistical import StatisticsMethod
from moerge.operations.fitter import FitContext, Fitter
from moerge.operations.operations import Draw
from moerge.registry import Registry
from moerge.routers.base import FittedRouter, Router
from moerge.routers.sequence import SequenceRouter
from moerge.tensors.kernels import kernel
from moerge.texts import Texts

__all__ = [
    "Block",
    "Draw",
    "Family",
    "FitContext",
    "FittedRouter",
    "Fitter",
    "InputError",
    "MergeMethod",
    "MoEFormat",
    "Registry",
    "Router",
    "SequenceRouter",
    "Statistic",
    "StatisticsMethod",
    "TaskVectorMethod",
    "TensorRule",
    "Texts",
    "kernel",
    "method",
]
