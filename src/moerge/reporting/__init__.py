"""One HTML page of what moerge's commands found: what was merged, how alike the experts are, routing, learning, measurements."""

from moerge.reporting.flow import Report, report, write_report

__all__ = ["Report", "report", "write_report"]
