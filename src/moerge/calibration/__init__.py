"""Unlabelled text that something is fitted to: reading it, and keeping it apart from text that is evaluated on."""

from moerge.calibration.overlap import check_disjoint, document_hash, overlap
from moerge.calibration.texts import SUFFIXES, Texts, read_documents, read_texts

__all__ = ["SUFFIXES", "Texts", "check_disjoint", "document_hash", "overlap", "read_documents", "read_texts"]
