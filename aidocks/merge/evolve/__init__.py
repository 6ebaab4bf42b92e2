"""Searching the parameters of a merge."""
