"""What a run keeps, checks and tells."""
