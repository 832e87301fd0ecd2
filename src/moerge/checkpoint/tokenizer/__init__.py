"""Tokenizer files: what tokens a model has, and which files a merged checkpoint gets."""

from moerge.checkpoint.tokenizer.files import (
    VOCABULARY_FILES,
    NewToken,
    companion_files,
    has_chat_template,
    next_added_id,
    with_new_tokens,
)
from moerge.checkpoint.tokenizer.pieces import Pieces, map_vocabulary
from moerge.checkpoint.tokenizer.spelling import Spelling
from moerge.checkpoint.tokenizer.vocabulary import (
    Vocabulary,
    by_position,
    has_tokenizer,
    read_vocabulary,
    same_files,
    special_tokens,
    token_ids,
)

__all__ = [
    "VOCABULARY_FILES",
    "NewToken",
    "Pieces",
    "Spelling",
    "Vocabulary",
    "by_position",
    "companion_files",
    "has_chat_template",
    "has_tokenizer",
    "map_vocabulary",
    "next_added_id",
    "read_vocabulary",
    "same_files",
    "special_tokens",
    "token_ids",
    "with_new_tokens",
]
