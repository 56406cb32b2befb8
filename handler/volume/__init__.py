"""What is on disk: manifests, sources, reading ahead, receipts, downloads."""
