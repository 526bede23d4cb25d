"""Remote block stores: object storage, local copies of its shards, and uploads."""
