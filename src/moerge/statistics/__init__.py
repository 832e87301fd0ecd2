"""Statistics of models over text, which some merge methods weigh experts by: gathering them, adding them up, using them."""

from moerge.statistics.files import Statistics, add_up, open_statistics, statistics_file

__all__ = ["Statistics", "add_up", "open_statistics", "statistics_file"]
