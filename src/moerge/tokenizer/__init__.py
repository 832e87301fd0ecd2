"""Tokenizer files: what tokens a model has, and which files a merged checkpoint gets."""

from moerge.checkpoint.locate import VOCABULARY_FILES
from moerge.tokenizer.files import (
    COMPANION_FILES,
    SETTINGS,
    TEMPLATES,
    NewToken,
    added_entry,
    companion_files,
    next_added_id,
    read_object,
    with_new_tokens,
    write_object,
)
from moerge.tokenizer.pieces import TokenAlignment, align_vocabulary
from moerge.tokenizer.spelling import TokenEncoding
from moerge.tokenizer.vocabulary import (
    Vocabulary,
    by_position,
    has_tokenizer,
    read_vocabulary,
    same_files,
    special_tokens,
    token_ids,
)

__all__ = [
    "COMPANION_FILES",
    "SETTINGS",
    "TEMPLATES",
    "VOCABULARY_FILES",
    "NewToken",
    "TokenAlignment",
    "TokenEncoding",
    "Vocabulary",
    "added_entry",
    "align_vocabulary",
    "by_position",
    "companion_files",
    "has_tokenizer",
    "next_added_id",
    "read_object",
    "read_vocabulary",
    "same_files",
    "special_tokens",
    "token_ids",
    "with_new_tokens",
    "write_object",
]
