"""What runs in place of the graph that is printed: our kernels called directly, each unique function compiled once."""
