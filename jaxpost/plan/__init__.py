"""What a program costs on hardware that is not here: compiled ahead of time, read, set against what chips can do."""
