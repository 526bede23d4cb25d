"""The teacher: token sequences in, sparse targets out.

engine.py runs the model under DeepSpeed and gives hidden states, head.py takes them through the
vocabulary in chunks, select.py keeps a few (token id, weight) of each distribution.
"""
