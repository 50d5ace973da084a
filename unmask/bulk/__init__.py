"""Bulk encoding: files of texts to files of vectors."""
