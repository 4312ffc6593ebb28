"""Training of the reference model and of its judge, everything from a seed: ``python -m exporter.reference.train``."""
