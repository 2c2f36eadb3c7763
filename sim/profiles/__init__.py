"""Measured timings of chips, fitted: importers of published tables, the curves that ship, and cost models of them."""
