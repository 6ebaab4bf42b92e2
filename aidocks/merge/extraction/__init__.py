"""Low-rank adapters out of the differences of two models."""
