"""`llmdistill init`: a pipeline, a prompt and a task card for rows of the user's own, ready to run and to edit."""
