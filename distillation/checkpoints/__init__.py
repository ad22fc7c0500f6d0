"""What --resume needs, the run record, and the output folders."""
