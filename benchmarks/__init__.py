"""``python -m benchmarks``: how long loads take here, beside the usual ways, and what they cost."""
