"""Retrieval in real C sources: their preparation, questions, scoring and training data."""
