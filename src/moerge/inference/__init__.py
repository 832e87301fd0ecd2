"""Running checkpoints: continuing text, and how text is routed."""
