"""Assembling token-routed MoEs: which expert's tensor goes where, and where the router comes from."""
