"""Models in memory: loading checkpoints with transformers, forced routing, replicas."""
