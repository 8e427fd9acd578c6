"""Where the library meets others: their file formats and their model classes.

Each module is imported on its own, so that nobody pays for a library they do not use.
"""
