"""Data of trainings of what finds texts: read in the common forms, detected, checked, joined by query, and divided."""
