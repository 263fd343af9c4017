"""Training objectives: a model, its data and its loss, one short file each."""
