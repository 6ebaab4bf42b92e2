"""Every figure is measured beside its limit or peer, in turns, in one run: `python -m benchmarks --help`."""
