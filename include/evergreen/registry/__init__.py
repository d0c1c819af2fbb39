"""Registry: MLflow versions with their whole lineage, and the one door through which the champion changes."""
