"""What a cut takes away, given back in closed form by what stays."""
