"""Fewer experts in a native mixture: statistics of one pass, scores, groups, folding, routers, and a smaller checkpoint."""
