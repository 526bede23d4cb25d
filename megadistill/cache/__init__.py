"""The cache: a block store of sequences with their targets.

build.py is the loop from teacher to store, cache_recipe.py what the bytes depend on, codec/ targets
as bytes, writer.py and reader.py the way in and out, statistics.py its contents in numbers.
"""
