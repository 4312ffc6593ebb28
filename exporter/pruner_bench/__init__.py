"""Every pruning method on one model, at one measured latency of one target, with one budget of recovery."""
