"""The HTTP front on Ray Serve. Never imports torch."""
