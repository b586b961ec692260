"""From a file of preferences to a PairBatch."""
