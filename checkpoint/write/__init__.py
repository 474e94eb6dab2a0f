"""New files from old ones: split, repaired, restored, quantised."""
