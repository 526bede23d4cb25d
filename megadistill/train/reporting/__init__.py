"""Reporting: metrics of each step, trackers, and device statistics."""
