"""Models by name: references, the registry with its manifests and cards, the hub."""
