"""What is worth a look in a partition, one small pure detector a file; registry.py lists them all."""
