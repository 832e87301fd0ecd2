"""Text that something is fitted to or measured on: reading it, making tokens of it, and telling texts apart."""

from moerge.texts.chat import Encoded, encode, encode_answers, end_token, has_template, render
from moerge.texts.conversations import Conversation, Document, text_of
from moerge.texts.documents import SUFFIXES, Texts, document_of, read_documents, read_texts
from moerge.texts.overlap import check_disjoint, document_hash, overlap
from moerge.texts.request import TextRequest

__all__ = [
    "SUFFIXES",
    "Conversation",
    "Document",
    "Encoded",
    "TextRequest",
    "Texts",
    "check_disjoint",
    "document_hash",
    "document_of",
    "encode",
    "encode_answers",
    "end_token",
    "has_template",
    "overlap",
    "read_documents",
    "read_texts",
    "render",
    "text_of",
]
