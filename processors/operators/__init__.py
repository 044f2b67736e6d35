"""The pure operators of the pipeline, each with its memory in event time declared."""
