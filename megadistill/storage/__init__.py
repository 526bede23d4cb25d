"""Storage: files and fsync, JSON records with checksums, locks, disks, counter-based numbers."""
