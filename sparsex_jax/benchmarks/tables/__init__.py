"""Markdown tables of the rows of results files; those of the README are made here."""
