"""Measurements and their files."""
