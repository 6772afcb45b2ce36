"""Files that are read and written: bounded and checked on the way in, whole or not at all on the way out."""
