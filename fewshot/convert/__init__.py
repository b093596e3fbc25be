"""Other projects' names of tensors, for those who come with a checkpoint."""
