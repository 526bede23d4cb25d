"""Functions and classes for trainers of one's own. `import megadistill` gives them by name.

They take numpy arrays and torch tensors, and name the argument that is wrong. The kernels
beneath (teacher.select, cache.codec, student.head) take tensors of one kind.
"""
