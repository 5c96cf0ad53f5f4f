"""Performance model, deployment search and hardware catalogue: pure decisions in seconds and bytes."""
