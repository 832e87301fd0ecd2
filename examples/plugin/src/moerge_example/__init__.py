"""A merge method, a family and a router for moerge, which finds them through the entry points in pyproject.toml."""
