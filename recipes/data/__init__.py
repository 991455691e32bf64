"""Readers of the real data sets' file formats."""
