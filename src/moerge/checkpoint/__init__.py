"""Hugging Face checkpoint folders: reading them lazily, writing them whole."""
