"""The process that a command runs in: how far it is, what ends it, what belongs to one of its threads."""
