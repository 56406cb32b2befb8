"""The table of node classes, a file for each subject."""
