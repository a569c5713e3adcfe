"""A teacher's knowledge added to the training of a student."""
