"""Unlabelled text that something is fitted to: reading it, and keeping it apart from text that is evaluated on."""

from moerge.texts.documents import SUFFIXES, Texts, read_documents, read_texts
from moerge.texts.overlap import check_disjoint, document_hash, overlap
from moerge.texts.request import TextRequest

__all__ = ["SUFFIXES", "TextRequest", "Texts", "check_disjoint", "document_hash", "overlap", "read_documents", "read_texts"]
