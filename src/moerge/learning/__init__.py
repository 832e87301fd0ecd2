"""Merging coefficients learned from unlabelled text: Expert Merging, Expert Merging++ (arXiv 2509.25712) and AdaMerging."""
