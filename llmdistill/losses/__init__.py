"""What a student is trained to do, one loss a file. What a pipeline imports from here loads no torch."""
