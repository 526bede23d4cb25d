"""The teacher: token sequences in, sparse targets out.

engine.py runs the model under DeepSpeed and gives hidden states, chunked_head.py multiplies them
with the vocabulary head in chunks, select.py keeps a few (token id, weight) of each distribution.
"""
