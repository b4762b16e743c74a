"""How well maps agree with what is true: measures of each task, all of one scan as rows of one tidy table."""
