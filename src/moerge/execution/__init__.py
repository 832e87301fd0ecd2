"""Execution of plans: streaming, scheduling, fitting."""
