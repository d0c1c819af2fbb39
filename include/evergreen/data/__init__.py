"""Data: from a source to clean partitions in the content-addressed store, named by an immutable snapshot."""
