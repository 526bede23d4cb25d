"""Streams of numbers as bytes: what the methods' codecs are made of."""
