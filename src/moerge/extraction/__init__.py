"""A task vector written as a LoRA: `moerge extract`."""

from moerge.extraction.extract import extract
from moerge.extraction.result import Extraction, Kept

__all__ = ["Extraction", "Kept", "extract"]
