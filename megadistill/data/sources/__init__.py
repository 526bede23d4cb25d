"""Sources: files, tables and datasets as documents, in an order that never changes."""
