"""Inspection: the facts, tables and pictures that the tools print and draw."""
