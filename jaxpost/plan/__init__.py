"""What a program costs on hardware that is not here: compiled ahead of time, read, and set against what chips can do."""
