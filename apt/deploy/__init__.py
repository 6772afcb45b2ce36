"""A finished model for the programs that people serve with: one file a format, behind one table."""
