"""Maintenance of block stores: verifying, repairing, merging and splitting."""
