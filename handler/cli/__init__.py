"""The command line: a file for each verb, with that verb's name."""
