"""Packing: documents become sequences of equal length, in order or by best fit."""
